"""A compiled model as a value: graph stages, weights, calling convention, and its origin."""
