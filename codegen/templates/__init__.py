"""Kernels as templates: when one cannot run a problem, how long it takes, and its launches for given operands."""
