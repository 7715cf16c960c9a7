"""The sections of `benchmarks/gpu.py`: each module has a `results(setting, ...)` that yields as it finds."""
