"""What ``save`` does: whether it is due, what is written, and the thread that writes it."""
