"""The original pipeline: its files and configs, its parts, and encoding with these parts."""
