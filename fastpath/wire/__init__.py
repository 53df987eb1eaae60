"""Pure codecs: bytes to fields and back. No allocation, no Python object, no system call."""
