"""Files and folders that are replaced as a whole, and messages about paths."""
