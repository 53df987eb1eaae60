from fastpath.drops import DropReason

def encode(vni: int) -> bytes:
    """The 8-byte RFC 8926 header without options for an Ethernet frame. ValueError if VNI > 2**24 - 1."""

def decode(datagram: bytes) -> tuple[int, int] | DropReason:
    """(VNI, header length in bytes), or why an endpoint that knows no option must drop it."""
