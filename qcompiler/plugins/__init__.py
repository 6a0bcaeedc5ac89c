"""Built-in exporters, found through entry points like third-party ones: the core does not import them."""
