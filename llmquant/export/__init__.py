"""Quantized models as files of other programs."""
