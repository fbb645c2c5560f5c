"""Modules: their state, what ``state_dict()`` leaves out, and whole models."""
