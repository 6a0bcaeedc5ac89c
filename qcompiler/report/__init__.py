"""The report: how each layer was quantized, or why not."""
