# struct virtio_net_hdr (linux/virtio_net.h): codec, and validation against the frame it describes.
# Never an fd. A TAP's header is in the host's byte order unless TUNSETVNETLE says otherwise.

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy

from fastpath.drops cimport DROP_VIRTIO_HEADER
from fastpath.wire.checksum cimport sum_add, sum_fold, sum_store
from fastpath.wire.classify cimport Frame
from fastpath.wire.ethernet cimport ETHERNET_HEADER
from fastpath.wire.ip cimport PROTOCOL_TCP, PROTOCOL_UDP, TCP_CHECKSUM, UDP_CHECKSUM


cdef enum:
    VIRTIO_HEADER = 10
    VIRTIO_NEEDS_CSUM = 1
    VIRTIO_UDP_TUNNEL_CSUM = 8
    VIRTIO_GSO_NONE = 0
    VIRTIO_GSO_TCPV4 = 1
    VIRTIO_GSO_TCPV6 = 4
    VIRTIO_GSO_UDP_L4 = 5
    VIRTIO_GSO_UDP_TUNNEL_IPV4 = 0x20  # with one of the above, and VIRTIO_UDP_TUNNEL_CSUM in the flags
    VIRTIO_GSO_UDP_TUNNEL_IPV6 = 0x40
    VIRTIO_GSO_ECN = 0x80  # a flag beside the TCP types: CWR is set in the first segment only


cdef struct VnetHeader:
    uint8_t flags
    uint8_t gso_type
    uint16_t header_length   # never trusted: on a forward path it may span the whole first packet
    uint16_t gso_size
    uint16_t checksum_start  # from the Ethernet header
    uint16_t checksum_offset


cdef inline VnetHeader virtio_decode(const uint8_t *data) noexcept nogil:
    cdef VnetHeader header
    header.flags = data[0]
    header.gso_type = data[1]
    memcpy(&header.header_length, data + 2, 2)
    memcpy(&header.gso_size, data + 4, 2)
    memcpy(&header.checksum_start, data + 6, 2)
    memcpy(&header.checksum_offset, data + 8, 2)
    return header


cdef inline void virtio_encode(uint8_t *data, const VnetHeader *header) noexcept nogil:
    data[0] = header.flags
    data[1] = header.gso_type
    memcpy(data + 2, &header.header_length, 2)
    memcpy(data + 4, &header.gso_size, 2)
    memcpy(data + 6, &header.checksum_start, 2)
    memcpy(data + 8, &header.checksum_offset, 2)


cdef inline int virtio_complete_checksum(
    const VnetHeader *header, uint8_t *frame, size_t length
) noexcept nogil:
    """Finish a partial checksum over frame[checksum_start:length]; 0 or the Drop. The field holds
    the pseudo-header's sum already. `length` ends at the IP packet: padding is never summed."""
    cdef size_t start = header.checksum_start
    cdef size_t field = start + header.checksum_offset
    cdef uint64_t total
    if not header.flags & VIRTIO_NEEDS_CSUM:
        return 0
    if start < ETHERNET_HEADER or field + 2 > length:
        return DROP_VIRTIO_HEADER
    total = sum_add(frame + start, length - start, 0)
    if header.checksum_offset == UDP_CHECKSUM and sum_fold(total) == 0xFFFF:
        total = 0  # RFC 768: a UDP checksum that comes out as zero is sent as all ones
    sum_store(frame + field, total)
    return 0


cdef inline bint virtio_covers_transport(const VnetHeader *header, const Frame *info) noexcept nogil:
    """Whether the partial checksum is the TCP or UDP checksum of this very packet."""
    if not header.flags & VIRTIO_NEEDS_CSUM or info.is_fragment:
        return False
    if header.checksum_start != ETHERNET_HEADER + info.header_length:
        return False
    if info.protocol == PROTOCOL_TCP:
        return header.checksum_offset == TCP_CHECKSUM
    return info.protocol == PROTOCOL_UDP and header.checksum_offset == UDP_CHECKSUM
