"""The scaled product with a body on its way out, in one kernel where that is faster, and in two elsewhere."""
