"""SmoothQuant: computes channel scales and folds them into the producers of activations."""
