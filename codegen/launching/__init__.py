"""GPU launches: cheap once compiled, replayed as a whole, and compiled ahead of use."""
