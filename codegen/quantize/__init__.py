"""Quantization of activations: kernel tiles, plain launches, and rows computed by a fused expression."""
