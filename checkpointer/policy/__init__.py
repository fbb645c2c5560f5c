"""Decisions that give reasons: what is due, what stays, what is written how. Pure functions."""
