"""The version of this library. The format on disk has a version of its own (manifest.VERSION)."""

__version__ = "0.1.0.dev0"
