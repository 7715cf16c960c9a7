"""The original pipeline: where it lies, what its files say, its parts, and encoding with them."""
