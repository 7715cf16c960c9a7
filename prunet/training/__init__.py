"""Distillation: in go teacher, student, pairs and cache, out comes a trained student, with checkpoints on the way."""
