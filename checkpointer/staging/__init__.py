"""Tensors to bytes in host memory, and back."""
