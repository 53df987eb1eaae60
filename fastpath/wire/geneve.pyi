from fastpath.drops import DropReason

def encode(vni: int, *, partial_checksum: bool = False, control: bool = False) -> bytes:
    """The 8-byte RFC 8926 header for an Ethernet frame, or 12 bytes with the one option we know (see
    geneve.pxd); `control` sets the O bit. ValueError if VNI > 2**24 - 1."""

def decode(datagram: bytes, *, partial_checksum: bool = False) -> tuple[int, int] | DropReason:
    """(VNI, header length in bytes), or why an endpoint must drop it that knows no option, or only the
    partial-checksum one."""
