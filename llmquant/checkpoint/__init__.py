"""Checkpoints: quantized tensors as plain ones in safetensors, described by a manifest in config.json."""
