"""What became of a model: layers and reasons, errors by operation, and the HTML page."""
