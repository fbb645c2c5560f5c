"""Python values as JSON trees with references to tensors, and back."""
