"""The scaled matmul with an epilogue, in one kernel where that is faster, else in two."""
