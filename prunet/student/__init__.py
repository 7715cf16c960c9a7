"""The smaller denoiser: in go a teacher and a plan, out comes a stock model with inherited weights."""
