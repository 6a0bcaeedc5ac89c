"""Passes that merge and fuse operations into kernels."""
