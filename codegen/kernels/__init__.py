"""The kernels: importable Triton sources, one file each, that can be read, run and measured separately."""
