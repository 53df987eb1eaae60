def checksum(data: bytes, initial: int = 0) -> int:
    """The Internet checksum (RFC 1071) of the bytes as they would be stored: complemented, 16 bits,
    host order of the big-endian value. `initial` is an uncomplemented partial sum to start from."""

def update16(checksum: int, old: int, new: int) -> int:
    """RFC 1624: the checksum after one 16-bit word changed from `old` to `new`."""
