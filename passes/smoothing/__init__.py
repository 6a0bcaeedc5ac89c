"""SmoothQuant: scales of channels, and their fold into what makes the activation."""
