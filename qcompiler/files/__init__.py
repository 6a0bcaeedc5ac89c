"""Atomic replacement of files and folders."""
