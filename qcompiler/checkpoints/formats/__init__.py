"""The checkpoint formats that can be written, one file each; a file has the name of its format, with underscores."""
