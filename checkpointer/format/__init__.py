"""What lies on disk, as pure functions: names, manifest, index, tensor files."""
