"""Files and folders that are replaced as a whole."""
