# Offsets and readers of IPv4 (RFC 791), IPv6 (RFC 8200), UDP and TCP. IPv6 extension headers are
# not walked: a packet that has one is forwarded by its addresses alone.

from libc.stdint cimport uint8_t, uint16_t

from fastpath.wire.byteorder cimport load16, store16
from fastpath.wire.checksum cimport checksum_update16, sum_add, sum_store
from libc.string cimport memcpy


cdef enum:
    IPV4_HEADER = 20
    IPV4_TOS = 1
    IPV4_LENGTH = 2
    IPV4_ID = 4
    IPV4_FRAGMENT = 6
    IPV4_DONT_FRAGMENT = 0x40  # in the byte at IPV4_FRAGMENT
    IPV4_TTL = 8
    IPV4_PROTOCOL = 9
    IPV4_CHECKSUM = 10
    IPV4_SOURCE = 12
    IPV4_DESTINATION = 16
    IPV4_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF

    IPV6_HEADER = 40
    IPV6_LENGTH = 4
    IPV6_NEXT_HEADER = 6
    IPV6_HOP_LIMIT = 7
    IPV6_SOURCE = 8
    IPV6_DESTINATION = 24

    PROTOCOL_HOP_BY_HOP = 0
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_ROUTING = 43
    PROTOCOL_FRAGMENT = 44
    PROTOCOL_DESTINATION = 60
    PROTOCOL_SCTP = 132

    TCP_HEADER = 20
    TCP_SEQUENCE = 4
    TCP_ACKNOWLEDGEMENT = 8
    TCP_DATA_OFFSET = 12
    TCP_FLAGS = 13
    TCP_WINDOW = 14
    TCP_CHECKSUM = 16
    TCP_URGENT = 18
    TCP_FIN = 0x01
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_ECE = 0x40
    TCP_CWR = 0x80

    UDP_HEADER = 8
    UDP_LENGTH = 4
    UDP_CHECKSUM = 6

    ECN_MASK = 3
    ECN_NOT_ECT = 0
    ECN_ECT1 = 1
    ECN_ECT0 = 2
    ECN_CE = 3


cdef inline uint8_t ipv6_traffic_class(const uint8_t *packet) noexcept nogil:
    return <uint8_t> (load16(packet) >> 4)


cdef inline void ipv4_set_length(uint8_t *packet, uint16_t header_length, uint16_t length) noexcept nogil:
    """Write the total length and the header checksum that goes with it."""
    store16(packet + IPV4_LENGTH, length)
    store16(packet + IPV4_CHECKSUM, 0)
    sum_store(packet + IPV4_CHECKSUM, sum_add(packet, header_length, 0))


cdef inline int ecn_combine(int inner, int outer) noexcept nogil:
    """RFC 6040 section 4.2: the ECN field to forward, -1 to drop."""
    if outer == ECN_CE:
        return -1 if inner == ECN_NOT_ECT else ECN_CE
    if outer == ECN_ECT1 and inner == ECN_ECT0:
        return ECN_ECT1
    return inner


cdef inline void ipv4_set_ecn(uint8_t *packet, int ecn) noexcept nogil:
    cdef uint16_t old, new
    memcpy(&old, packet, 2)
    packet[IPV4_TOS] = <uint8_t> ((packet[IPV4_TOS] & ~ECN_MASK) | ecn)
    memcpy(&new, packet, 2)
    checksum_update16(packet + IPV4_CHECKSUM, old, new)


cdef inline void ipv6_set_ecn(uint8_t *packet, int ecn) noexcept nogil:
    # The ECN bits are bits 4-5 of the second byte: version(4) class(8) label(20).
    packet[1] = <uint8_t> ((packet[1] & 0xCF) | (ecn << 4))
