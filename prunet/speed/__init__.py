"""How fast models draw, and what takes the time."""
