"""Quantization-aware training: fake quantization while a model trains, quantized tensors afterwards."""
