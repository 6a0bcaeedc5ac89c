"""Passes that bring a captured graph into the form that later passes expect."""
