"""The torch operators over our kernels, one file each: see `codegen.operators.operator`."""
