"""The edge: the only extension modules that make system calls."""
