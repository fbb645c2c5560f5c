"""What ``restore`` does: which checkpoint, what fits, and reading it into live objects."""
