"""A compiled model as a value: graph stages, weights, calling convention, and what it was compiled from."""
