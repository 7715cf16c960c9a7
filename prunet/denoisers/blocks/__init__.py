"""Denoisers that are lists of equal blocks (diffusion transformers): their forms, from a config and a plan."""
