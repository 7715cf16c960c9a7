"""Denoisers that are lists of equal blocks (diffusion transformers): in goes a config and what a plan removes, out
comes the form that is left.
"""
