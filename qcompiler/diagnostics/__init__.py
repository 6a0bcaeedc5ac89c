"""Error analysis: where a compiled model loses accuracy, and where it first computes a NaN or an infinity."""
