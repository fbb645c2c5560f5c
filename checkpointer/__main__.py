"""``python -m checkpointer``: the command line."""

from __future__ import annotations

from checkpointer.cli import main

if __name__ == "__main__":
    main()
