"""Training. In: teacher, student, pairs and cache. Out: a trained student, with checkpoints on the way."""
