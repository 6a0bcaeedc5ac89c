"""Passes and pipelines: their text, how they run, and what watches them."""
