# VXLAN, RFC 7348. No UDP, no sockets.

from libc.stdint cimport uint8_t, uint32_t

from fastpath.drops cimport DROP_TUNNEL_FLAGS, DROP_TUNNEL_SHORT
from fastpath.wire.byteorder cimport load32, store32


cdef enum:
    VXLAN_HEADER = 8
    VXLAN_VNI_VALID = 0x08000000


cdef inline void vxlan_encode(uint8_t *header, uint32_t vni) noexcept nogil:
    store32(header, VXLAN_VNI_VALID)
    store32(header + 4, vni << 8)


cdef inline int vxlan_decode(
    const uint8_t *datagram, size_t length, bint strict, uint32_t *vni
) noexcept nogil:
    """Bytes of the header, or -Drop. `strict` refuses reserved bits, as drivers/net/vxlan does;
    RFC 7348 section 5 would ignore them."""
    cdef uint32_t flags, identifier
    if length < VXLAN_HEADER:
        return -DROP_TUNNEL_SHORT
    flags = load32(datagram)
    identifier = load32(datagram + 4)
    if not flags & VXLAN_VNI_VALID:
        return -DROP_TUNNEL_FLAGS
    if strict and (flags != VXLAN_VNI_VALID or identifier & 0xFF):
        return -DROP_TUNNEL_FLAGS
    vni[0] = identifier >> 8
    return VXLAN_HEADER
