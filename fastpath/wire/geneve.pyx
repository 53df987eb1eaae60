"""Python face of the Geneve codec, for tests and benches."""

from fastpath.drops import DropReason


def encode(vni: int) -> bytes:
    """The 8-byte RFC 8926 header without options for an Ethernet frame."""
    cdef uint8_t header[GENEVE_HEADER]
    if not 0 <= vni < 1 << 24:
        raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
    geneve_encode(header, vni)
    return header[:GENEVE_HEADER]


def decode(const uint8_t[::1] datagram not None):
    """(VNI, header length in bytes), or why an endpoint that knows no option must drop it."""
    cdef uint32_t vni = 0
    cdef int length = geneve_decode(&datagram[0] if datagram.shape[0] else NULL, datagram.shape[0], &vni)
    return (vni, length) if length > 0 else DropReason(-length)
