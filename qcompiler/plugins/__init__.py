"""Our own exporters, found by entry points as those of other distributions are: the core imports none of them."""
