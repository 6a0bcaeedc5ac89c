"""The checkpoint formats that can only be read, one file each."""
