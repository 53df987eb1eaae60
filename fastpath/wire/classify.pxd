# One frame -> what the pump needs to know of it. Reads headers, looks nothing up.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastpath.drops cimport (
    DROP_FRAME_NOT_IP,
    DROP_FRAME_SHORT,
    DROP_FRAME_VLAN,
    DROP_IP_MALFORMED,
    DROP_IP_TTL_EXPIRED,
)
from fastpath.wire.byteorder cimport load16
from fastpath.wire.ethernet cimport (
    ETHERNET_HEADER,
    ETHERNET_TYPE,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    ETHERTYPE_QINQ,
    ETHERTYPE_VLAN,
)
from fastpath.wire.ip cimport (
    IPV4_DESTINATION,
    IPV4_FRAGMENT,
    IPV4_HEADER,
    IPV4_LENGTH,
    IPV4_MORE_FRAGMENTS_OR_OFFSET,
    IPV4_PROTOCOL,
    IPV4_SOURCE,
    IPV4_TOS,
    IPV4_TTL,
    IPV6_DESTINATION,
    IPV6_HEADER,
    IPV6_HOP_LIMIT,
    IPV6_LENGTH,
    IPV6_NEXT_HEADER,
    IPV6_SOURCE,
    PROTOCOL_FRAGMENT,
    PROTOCOL_SCTP,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    ipv6_traffic_class,
)


# `packet` and the two addresses are borrowed: they point into the frame that was classified.
cdef struct Frame:
    uint8_t *packet
    const uint8_t *source
    const uint8_t *destination
    uint32_t packet_length   # bytes, by the IP header's own word; padding is behind it
    uint32_t flow_hash
    uint16_t header_length
    uint8_t family           # 4 or 6
    uint8_t protocol
    uint8_t tos
    bint is_fragment


cdef inline uint64_t mix64(uint64_t value) noexcept nogil:
    """A bijection in which each input bit moves every output bit (multiply and xor-shift)."""
    value ^= value >> 32
    value *= <uint64_t> 0xD6E8FEB86659FD93
    value ^= value >> 32
    value *= <uint64_t> 0xD6E8FEB86659FD93
    value ^= value >> 32
    return value


cdef inline uint32_t flow_hash(const Frame *info) noexcept nogil:
    cdef uint64_t words[4]
    cdef uint64_t hashed = info.protocol
    cdef uint32_t ports = 0
    cdef int count = 1
    cdef int i
    if info.family == 4:
        memcpy(words, info.source, 8)  # source and destination lie side by side
    else:
        memcpy(words, info.source, 32)
        count = 4
    if (
        not info.is_fragment
        and info.protocol in (PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP)
        and info.packet_length >= <uint32_t> info.header_length + 4
    ):
        memcpy(&ports, info.packet + info.header_length, 4)
    hashed |= <uint64_t> ports << 8
    for i in range(count):
        hashed = mix64(hashed ^ words[i])
    return <uint32_t> (hashed >> 32)


cdef inline int classify_ipv4(uint8_t *packet, size_t available, Frame *info) noexcept nogil:
    if available < IPV4_HEADER or packet[0] >> 4 != 4:
        return DROP_IP_MALFORMED
    info.header_length = (packet[0] & 0x0F) * 4
    info.packet_length = load16(packet + IPV4_LENGTH)
    if (
        info.header_length < IPV4_HEADER
        or info.packet_length < info.header_length
        or info.packet_length > available
    ):
        return DROP_IP_MALFORMED
    if packet[IPV4_TTL] == 0:
        return DROP_IP_TTL_EXPIRED
    info.family = 4
    info.source = packet + IPV4_SOURCE
    info.destination = packet + IPV4_DESTINATION
    info.protocol = packet[IPV4_PROTOCOL]
    info.tos = packet[IPV4_TOS]
    info.is_fragment = load16(packet + IPV4_FRAGMENT) & IPV4_MORE_FRAGMENTS_OR_OFFSET != 0
    return 0


cdef inline int classify_ipv6(uint8_t *packet, size_t available, Frame *info) noexcept nogil:
    if available < IPV6_HEADER or packet[0] >> 4 != 6:
        return DROP_IP_MALFORMED
    info.header_length = IPV6_HEADER
    info.packet_length = IPV6_HEADER + load16(packet + IPV6_LENGTH)
    if info.packet_length > available:
        return DROP_IP_MALFORMED
    if packet[IPV6_HOP_LIMIT] == 0:
        return DROP_IP_TTL_EXPIRED
    info.family = 6
    info.source = packet + IPV6_SOURCE
    info.destination = packet + IPV6_DESTINATION
    info.protocol = packet[IPV6_NEXT_HEADER]
    info.tos = ipv6_traffic_class(packet)
    info.is_fragment = info.protocol == PROTOCOL_FRAGMENT
    return 0


cdef inline int classify_frame(uint8_t *frame, size_t length, Frame *info) noexcept nogil:
    """Fill `info` and return 0, or return the Drop."""
    cdef uint16_t ethertype
    cdef int drop
    if length < ETHERNET_HEADER:
        return DROP_FRAME_SHORT
    ethertype = load16(frame + ETHERNET_TYPE)
    info.packet = frame + ETHERNET_HEADER
    if ethertype == ETHERTYPE_IPV4:
        drop = classify_ipv4(info.packet, length - ETHERNET_HEADER, info)
    elif ethertype == ETHERTYPE_IPV6:
        drop = classify_ipv6(info.packet, length - ETHERNET_HEADER, info)
    elif ethertype in (ETHERTYPE_VLAN, ETHERTYPE_QINQ):
        drop = DROP_FRAME_VLAN
    else:
        drop = DROP_FRAME_NOT_IP
    return drop
