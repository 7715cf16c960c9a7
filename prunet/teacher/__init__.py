"""The original pipeline: its files and configs, its parts, and encoding with them."""
