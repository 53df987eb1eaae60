# A whole superframe inside its tunnel, for a TAP that takes UDP tunnel GSO (Linux 6.17): the kernel,
# or the card, cuts it and finishes both checksums, as it does for a tunnel of its own.
#
# struct virtio_net_hdr_v1_hash_tunnel (linux/virtio_net.h) is the plain header and 14 bytes more; the
# offsets in it count from the outer Ethernet header. The outer UDP checksum is always asked for:
# receivers merge only datagrams that have one.

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memset

from fastpath.offload.segment cimport Superframe
from fastpath.offload.virtio cimport (
    VIRTIO_GSO_ECN,
    VIRTIO_GSO_TCPV4,
    VIRTIO_GSO_TCPV6,
    VIRTIO_GSO_UDP_TUNNEL_IPV4,
    VIRTIO_GSO_UDP_TUNNEL_IPV6,
    VIRTIO_NEEDS_CSUM,
    VIRTIO_UDP_TUNNEL_CSUM,
    VnetHeader,
    virtio_encode,
)
from fastpath.wire.byteorder cimport raw16, store16
from fastpath.wire.checksum cimport sum_add, sum_fold
from fastpath.wire.ethernet cimport ETHERNET_HEADER, ETHERNET_TYPE, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from fastpath.wire.ip cimport (
    IPV4_DESTINATION,
    IPV4_DONT_FRAGMENT,
    IPV4_FRAGMENT,
    IPV4_HEADER,
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
    PROTOCOL_UDP,
    TCP_CHECKSUM,
    UDP_CHECKSUM,
    UDP_HEADER,
    UDP_LENGTH,
    ipv4_set_length,
)


cdef enum:
    TUNNEL_VNET_HEADER = 24
    TUNNEL_HEADERS = TUNNEL_VNET_HEADER + 14 + 40 + 8 + 8  # the most that lies before the inner frame
    TUNNEL_INNER_BYTES = 65535 - 20 - 8 - 8  # of inner frame: the outer lengths have 16 bits
    OUTER_TTL = 64
    OUTER_TRANSPORT = 20     # where in the virtio header outer_th_offset lies
    INNER_NETWORK = 22       # and inner_nh_offset


# The outer addresses of one path, in network order. `family` is 4 or 6.
cdef struct OuterPath:
    uint8_t family
    uint8_t source[16]
    uint8_t destination[16]
    uint16_t source_port
    uint16_t destination_port


cdef inline int tunnel_headers(
    const Superframe *cut,
    const uint8_t *tunnel,
    const OuterPath *path,
    const uint8_t *uplink_mac,
    int ecn,
) noexcept nogil:
    """Write everything that comes before the superframe into the bytes before it, from the virtio header
    to the 8 bytes of `tunnel`; how many there are."""
    cdef int ip_header = IPV4_HEADER if path.family == 4 else IPV6_HEADER
    cdef int address_bytes = 4 if path.family == 4 else 16
    cdef int outer_transport = ETHERNET_HEADER + ip_header
    cdef int outer = outer_transport + UDP_HEADER + 8
    cdef uint8_t *ethernet = cut.frame - outer
    cdef uint8_t *packet = ethernet + ETHERNET_HEADER
    cdef uint8_t *udp = packet + ip_header
    cdef uint8_t *virtio = ethernet - TUNNEL_VNET_HEADER
    cdef uint16_t udp_length = <uint16_t> (UDP_HEADER + 8 + cut.headers + cut.payload)
    cdef uint16_t sum
    cdef VnetHeader offload
    memset(virtio, 0, TUNNEL_VNET_HEADER + outer)
    offload.flags = VIRTIO_NEEDS_CSUM | VIRTIO_UDP_TUNNEL_CSUM
    offload.gso_type = VIRTIO_GSO_TCPV4 if cut.family == 4 else VIRTIO_GSO_TCPV6
    offload.gso_type |= VIRTIO_GSO_UDP_TUNNEL_IPV4 if path.family == 4 else VIRTIO_GSO_UDP_TUNNEL_IPV6
    if cut.congestion_reduced:
        offload.gso_type |= VIRTIO_GSO_ECN
    offload.header_length = <uint16_t> (outer + cut.headers)
    offload.gso_size = <uint16_t> cut.size
    offload.checksum_start = <uint16_t> (outer + cut.transport)
    offload.checksum_offset = TCP_CHECKSUM
    virtio_encode(virtio, &offload)
    sum = <uint16_t> outer_transport
    memcpy(virtio + OUTER_TRANSPORT, &sum, 2)
    sum = <uint16_t> (outer + ETHERNET_HEADER)
    memcpy(virtio + INNER_NETWORK, &sum, 2)

    memcpy(ethernet, uplink_mac, 6)
    ethernet[6] = 0x02  # from anybody: the kernel only looks at whom it is for
    if path.family == 4:
        store16(ethernet + ETHERNET_TYPE, ETHERTYPE_IPV4)
        packet[0] = 0x45
        packet[IPV4_TOS] = <uint8_t> ecn
        packet[IPV4_FRAGMENT] = IPV4_DONT_FRAGMENT
        packet[IPV4_TTL] = OUTER_TTL
        packet[IPV4_PROTOCOL] = PROTOCOL_UDP
        memcpy(packet + IPV4_SOURCE, path.source, 4)
        memcpy(packet + IPV4_DESTINATION, path.destination, 4)
        ipv4_set_length(packet, IPV4_HEADER, IPV4_HEADER + udp_length)
    else:
        store16(ethernet + ETHERNET_TYPE, ETHERTYPE_IPV6)
        packet[0] = 0x60
        packet[1] = <uint8_t> (ecn << 4)
        store16(packet + IPV6_LENGTH, udp_length)
        packet[IPV6_NEXT_HEADER] = PROTOCOL_UDP
        packet[IPV6_HOP_LIMIT] = OUTER_TTL
        memcpy(packet + IPV6_SOURCE, path.source, 16)
        memcpy(packet + IPV6_DESTINATION, path.destination, 16)
    store16(udp, path.source_port)
    store16(udp + 2, path.destination_port)
    store16(udp + UDP_LENGTH, udp_length)
    sum = sum_fold(
        sum_add(
            path.source,
            address_bytes,
            sum_add(path.destination, address_bytes, <uint64_t> raw16(udp_length) + raw16(PROTOCOL_UDP)),
        )
    )
    memcpy(udp + UDP_CHECKSUM, &sum, 2)
    memcpy(udp + UDP_HEADER, tunnel, 8)
    return TUNNEL_VNET_HEADER + outer
