"""Kernel templates: which problems each supports, its estimated time, and its launches for given operands."""
