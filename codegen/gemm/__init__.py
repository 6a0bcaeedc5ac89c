"""The scaled product: what can run it, what is fastest, its launch, and the operator that checks its operands."""
