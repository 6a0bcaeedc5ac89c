"""Passes that rewrite attention."""
