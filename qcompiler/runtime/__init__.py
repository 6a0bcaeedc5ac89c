"""Runtime support for compiled models."""
