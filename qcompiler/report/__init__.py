"""What became of every layer: quantized to which format, or why not."""
