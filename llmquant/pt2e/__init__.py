"""Graph-mode quantization of exported programs (PyTorch 2 Export)."""
