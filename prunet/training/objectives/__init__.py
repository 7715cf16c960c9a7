"""Objectives: what a stage of training minimises. Each file is one objective of the loop (`prunet.training.loop`)."""
