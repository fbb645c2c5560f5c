"""The operating system: direct I/O, memory, threads, signals."""
