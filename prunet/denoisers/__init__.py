"""What a denoiser is made of, what of it can go, and how its features are caught."""
