"""Launches on a GPU: cheap once compiled, remembered as a whole, and compiled before they are needed."""
