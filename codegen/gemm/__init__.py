"""The scaled matmul: supported formats, choice of configuration, launch, and the operator that checks operands."""
