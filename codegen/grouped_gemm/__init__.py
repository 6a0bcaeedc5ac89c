"""One matmul for each group of rows, such as the tokens of an expert."""
