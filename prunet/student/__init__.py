"""The smaller denoiser: a teacher and a plan go in, a stock model with inherited weights comes out."""
