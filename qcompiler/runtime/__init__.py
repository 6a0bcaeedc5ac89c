"""What a compiled model needs when it runs."""
