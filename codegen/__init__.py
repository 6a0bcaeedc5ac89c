"""Code generation: kernels, the choice of their configuration, torch operators over them, and the host module."""
