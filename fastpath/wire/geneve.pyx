"""Python face of the Geneve codec, for tests and benches."""

from fastpath.drops import DropReason


def encode(vni: int, *, bint partial_checksum=False, bint control=False) -> bytes:
    """The 8-byte RFC 8926 header for an Ethernet frame, or 12 bytes with the one option we know; `control`
    sets the O bit."""
    cdef uint8_t header[GENEVE_PARTIAL_HEADER]
    if not 0 <= vni < 1 << 24:
        raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
    if partial_checksum:
        geneve_encode_partial(header, vni)
        header[1] |= GENEVE_OAM if control else 0
        return header[:GENEVE_PARTIAL_HEADER]
    geneve_encode(header, vni)
    header[1] |= GENEVE_OAM if control else 0
    return header[:GENEVE_HEADER]


def decode(const uint8_t[::1] datagram not None, *, bint partial_checksum=False):
    """(VNI, header length in bytes), or why an endpoint must drop it that knows no option, or only the
    partial-checksum one."""
    cdef uint32_t vni = 0
    cdef int length = geneve_decode(
        &datagram[0] if datagram.shape[0] else NULL, datagram.shape[0], &vni, &partial_checksum
    )
    return (vni, length) if length > 0 else DropReason(-length)
