"""Quantized checkpoints of other libraries, read as ours."""
