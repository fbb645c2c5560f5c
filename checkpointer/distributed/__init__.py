"""Tensors in pieces: which rank writes which box of them, and reading boxes out of chunks of another layout."""
