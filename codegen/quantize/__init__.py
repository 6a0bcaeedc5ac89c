"""Quantization of activations: tiles of the kernels, plain launches, and rows that a body computes first."""
