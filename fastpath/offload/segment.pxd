# One superframe -> its segments, each whole: headers of ours, and its payload copied behind them. The
# payload has to be loaded for its checksum anyhow, and a send that gathers segments from many pieces
# costs more than the copy.
#
# The rules are those of the kernel's own GSO (net/ipv4/tcp_offload.c, udp_offload.c): sequence number
# and IPv4 ID advance, FIN and PSH only on the last, CWR only on the first, each checksum complete.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastpath.drops cimport DROP_VIRTIO_HEADER
from fastpath.offload.virtio cimport (
    VIRTIO_GSO_ECN,
    VIRTIO_GSO_TCPV4,
    VIRTIO_GSO_TCPV6,
    VIRTIO_GSO_UDP_L4,
    VIRTIO_NEEDS_CSUM,
    VnetHeader,
)
from fastpath.wire.byteorder cimport load16, load32, raw16, store16, store32
from fastpath.wire.checksum cimport sum_add, sum_copy, sum_fold, sum_store
from fastpath.wire.classify cimport Frame
from fastpath.wire.ethernet cimport ETHERNET_HEADER
from fastpath.wire.ip cimport (
    IPV4_ID,
    IPV6_HEADER,
    IPV6_LENGTH,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_CHECKSUM,
    TCP_CWR,
    TCP_DATA_OFFSET,
    TCP_FIN,
    TCP_FLAGS,
    TCP_HEADER,
    TCP_PSH,
    TCP_SEQUENCE,
    UDP_CHECKSUM,
    UDP_HEADER,
    UDP_LENGTH,
    ipv4_set_length,
)


cdef enum:
    SEGMENT_HEADERS = 192  # the longest Ethernet + IP + transport header that is cut


cdef struct Superframe:
    uint8_t *frame           # borrowed
    uint32_t headers         # bytes of Ethernet, IP and transport headers
    uint32_t transport       # where the transport header begins
    uint32_t payload         # bytes behind the headers
    uint32_t size            # payload bytes of each segment but the last
    uint32_t count           # segments
    uint64_t pseudo_sum      # raw sum of the pseudo-header without its length
    uint16_t ip_header       # bytes of the IPv4 header
    uint8_t family
    bint tcp
    bint congestion_reduced  # the first segment carries CWR, and no other may


cdef inline int segment_open(
    const VnetHeader *offload, uint8_t *frame, const Frame *info, Superframe *cut
) noexcept nogil:
    """Check that the virtio header and the frame agree; 0, or the Drop. header_length is not read:
    where the transport header begins is checksum_start, and it tells its own length."""
    cdef int kind = offload.gso_type & ~VIRTIO_GSO_ECN
    cdef uint32_t ip_end = ETHERNET_HEADER + info.header_length
    cdef uint32_t end = ETHERNET_HEADER + info.packet_length
    cdef uint16_t length_raw, field
    cdef uint32_t own
    cut.frame = frame
    cut.family = info.family
    cut.ip_header = info.header_length
    cut.transport = offload.checksum_start
    cut.size = offload.gso_size
    cut.tcp = kind != VIRTIO_GSO_UDP_L4
    cut.congestion_reduced = offload.gso_type & VIRTIO_GSO_ECN != 0
    if kind not in (VIRTIO_GSO_TCPV4, VIRTIO_GSO_TCPV6, VIRTIO_GSO_UDP_L4):
        return DROP_VIRTIO_HEADER
    if (kind == VIRTIO_GSO_TCPV4 and info.family != 4) or (kind == VIRTIO_GSO_TCPV6 and info.family != 6):
        return DROP_VIRTIO_HEADER
    if cut.size == 0 or not offload.flags & VIRTIO_NEEDS_CSUM or info.is_fragment:
        return DROP_VIRTIO_HEADER
    if cut.transport < ip_end or (cut.transport > ip_end and info.family == 4):
        return DROP_VIRTIO_HEADER
    # Behind IPv6 extension headers, which are not walked, the protocol is taken on trust.
    if cut.transport == ip_end and info.protocol != (PROTOCOL_TCP if cut.tcp else PROTOCOL_UDP):
        return DROP_VIRTIO_HEADER
    own = TCP_HEADER if cut.tcp else UDP_HEADER
    if cut.transport + own > end or offload.checksum_offset != (TCP_CHECKSUM if cut.tcp else UDP_CHECKSUM):
        return DROP_VIRTIO_HEADER
    if cut.tcp:
        own = (frame[cut.transport + TCP_DATA_OFFSET] >> 4) * 4
    cut.headers = cut.transport + own
    if own < <uint32_t> (TCP_HEADER if cut.tcp else UDP_HEADER):
        return DROP_VIRTIO_HEADER
    if cut.headers > SEGMENT_HEADERS or cut.headers >= end:
        return DROP_VIRTIO_HEADER
    cut.payload = end - cut.headers
    cut.count = (cut.payload + cut.size - 1) // cut.size
    # The checksum field holds the pseudo-header's sum with the superframe's length in it.
    length_raw = raw16(<uint16_t> (end - cut.transport))
    memcpy(&field, frame + cut.transport + offload.checksum_offset, 2)
    cut.pseudo_sum = <uint64_t> field + <uint16_t> ~length_raw
    return 0


cdef inline uint32_t segment_bytes(const Superframe *cut, uint32_t i) noexcept nogil:
    """Bytes of segment i, headers and payload."""
    return cut.headers + (cut.size if i + 1 < cut.count else cut.payload - i * cut.size)


cdef inline void segment_write(
    const Superframe *cut, uint32_t i, uint8_t *segment, bint partial
) noexcept nogil:
    """Write segment i. `partial` leaves the pseudo-header's sum in its checksum field."""
    cdef uint32_t at = i * cut.size
    cdef uint32_t length = segment_bytes(cut, i)
    cdef uint32_t transport_length = length - cut.transport
    cdef uint8_t *packet = segment + ETHERNET_HEADER
    cdef uint8_t *transport = segment + cut.transport
    cdef uint8_t *payload = segment + cut.headers
    cdef uint8_t *check = transport + (TCP_CHECKSUM if cut.tcp else UDP_CHECKSUM)
    cdef uint64_t total
    cdef uint16_t sum
    memcpy(segment, cut.frame, cut.headers)
    if cut.family == 4:
        store16(packet + IPV4_ID, <uint16_t> (load16(packet + IPV4_ID) + i))
        ipv4_set_length(packet, cut.ip_header, <uint16_t> (length - ETHERNET_HEADER))
    else:
        store16(packet + IPV6_LENGTH, <uint16_t> (length - ETHERNET_HEADER - IPV6_HEADER))
    if cut.tcp:
        store32(transport + TCP_SEQUENCE, load32(transport + TCP_SEQUENCE) + at)
        if i:
            transport[TCP_FLAGS] &= <uint8_t> ~TCP_CWR
        if i + 1 < cut.count:
            transport[TCP_FLAGS] &= <uint8_t> ~(TCP_FIN | TCP_PSH)
    else:
        store16(transport + UDP_LENGTH, <uint16_t> transport_length)
    store16(check, 0)
    total = cut.pseudo_sum + raw16(<uint16_t> transport_length)
    if partial:
        sum = sum_fold(total)
        memcpy(check, &sum, 2)
        memcpy(payload, cut.frame + cut.headers + at, length - cut.headers)
        return
    total = sum_add(transport, cut.headers - cut.transport, total)
    total = sum_copy(payload, cut.frame + cut.headers + at, length - cut.headers, total)
    if not cut.tcp and sum_fold(total) == 0xFFFF:
        total = 0  # RFC 768: a UDP checksum that comes out as zero is sent as all ones
    sum_store(check, total)
