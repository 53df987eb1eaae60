"""Python face of the VXLAN codec, for tests and benches."""

from fastpath.drops import DropReason


def encode(vni: int) -> bytes:
    """The 8-byte RFC 7348 header."""
    cdef uint8_t header[VXLAN_HEADER]
    if not 0 <= vni < 1 << 24:
        raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
    vxlan_encode(header, vni)
    return header[:VXLAN_HEADER]


def decode(const uint8_t[::1] datagram not None, *, bint strict=True):
    """(VNI, 8), or the drop reason."""
    cdef uint32_t vni = 0
    cdef int length = vxlan_decode(
        &datagram[0] if datagram.shape[0] else NULL, datagram.shape[0], strict, &vni
    )
    return (vni, length) if length > 0 else DropReason(-length)
