"""Optimizers: their state, matched by the names of parameters."""
