"""How the ranks of a job agree: on what is saved, by which rank, and on errors."""
