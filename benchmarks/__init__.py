"""How long saving and restoring take, next to what the machine can do and to what others take: ``scripts/bench``."""
