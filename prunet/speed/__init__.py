"""How fast models draw, and where the time goes."""
