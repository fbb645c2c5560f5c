"""One run root: list, write, commit, read, verify, watch, remove. Knows no torch."""
