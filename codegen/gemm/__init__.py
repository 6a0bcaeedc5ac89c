"""Measured configurations of the GEMM: the tuner that measures them, and their choice."""
