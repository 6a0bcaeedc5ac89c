"""From a model to a program, and the callable around it."""
