"""The fast path: Cython, nogil, moves bytes. No policy, no names of peers, no clock, no configuration."""
