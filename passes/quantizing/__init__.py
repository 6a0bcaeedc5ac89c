"""Passes that insert quantization and fold it into weights."""
