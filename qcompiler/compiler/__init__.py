"""Compilation from a model to a program, and the callable that wraps it."""
