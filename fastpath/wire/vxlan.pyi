from fastpath.drops import DropReason

def encode(vni: int) -> bytes:
    """The 8-byte RFC 7348 header. ValueError if VNI > 2**24 - 1."""

def decode(datagram: bytes, *, strict: bool = True) -> tuple[int, int] | DropReason:
    """(VNI, 8), or the drop reason. `strict` drops non-zero reserved bits as the Linux driver does;
    otherwise they are ignored as RFC 7348 section 5 says."""
