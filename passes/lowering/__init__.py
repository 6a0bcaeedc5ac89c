"""From the `quant` dialect to the `kernel` dialect."""
