# Packets -> superframes, on the way to the TAP. One predicate per rule; what no rule allows goes
# alone. The rules are the kernel's own GRO's (net/ipv4/tcp_offload.c) and a little stricter.
#
# A packet joins the newest chain of its flow or begins one, and chains leave in the order they
# began: packets of one flow are never reordered. Chains live for one batch: nothing waits.
#
# A chain of two or more is handed over as NEEDS_CSUM, which the stack trusts: so each member's
# checksum is verified before it joins, or the frame's corruption would be laundered.
#
# A peer on the same host may send packets whose checksum is only partial: its kernel never finished
# it, because no wire was crossed. Such a field is the pseudo-header's sum. A field that is that sum
# and does not verify is taken as partial; a corrupted packet looks so as seldom as it looks right.
#
# borrowed: every packet pointer, until the batch's buffers are received into again.

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from fastpath.linux cimport iovec
from fastpath.offload.virtio cimport (
    VIRTIO_GSO_TCPV4,
    VIRTIO_GSO_TCPV6,
    VIRTIO_GSO_UDP_L4,
    VIRTIO_NEEDS_CSUM,
    VnetHeader,
)
from fastpath.wire.byteorder cimport load16, load32, raw16, store16
from fastpath.wire.checksum cimport sum_add, sum_fold
from fastpath.wire.classify cimport Frame, flow_hash
from fastpath.wire.ethernet cimport ETHERNET_HEADER
from fastpath.wire.ip cimport (
    IPV4_DESTINATION,
    IPV4_DONT_FRAGMENT,
    IPV4_FRAGMENT,
    IPV4_HEADER,
    IPV4_ID,
    IPV4_SOURCE,
    IPV4_TTL,
    IPV6_HEADER,
    IPV6_HOP_LIMIT,
    IPV6_LENGTH,
    IPV6_SOURCE,
    PROTOCOL_DESTINATION,
    PROTOCOL_HOP_BY_HOP,
    PROTOCOL_ROUTING,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_ACK,
    TCP_ACKNOWLEDGEMENT,
    TCP_CHECKSUM,
    TCP_DATA_OFFSET,
    TCP_ECE,
    TCP_FLAGS,
    TCP_HEADER,
    TCP_PSH,
    TCP_SEQUENCE,
    TCP_URGENT,
    TCP_WINDOW,
    UDP_CHECKSUM,
    UDP_HEADER,
    UDP_LENGTH,
    ipv4_set_length,
)


cdef enum:
    CHAINS = 128            # open at once; one more flushes them all
    CHAIN_PACKETS = 64
    CHAIN_BYTES = 65535     # of the whole IP packet
    CHAIN_HEADERS = 100     # the longest IPv6 + TCP header
    BUCKETS = 256           # a power of two
    NO_CHAIN = -1


cdef struct Chain:
    Frame first             # of the first packet
    uint32_t flow
    uint32_t headers        # bytes of IP and transport header; 0: nothing may join
    uint32_t size           # payload of each packet but the last
    uint32_t payload        # bytes so far
    uint32_t next_sequence
    uint16_t packets
    uint16_t superframe     # segment size of a packet that came as a superframe already, else 0
    uint16_t slot           # the peer it came from
    uint8_t last_flags
    bint partial            # the first packet's checksum is
    bint verified           # the first packet's checksum is known to hold, or partial
    bint closed
    iovec pieces[1 + CHAIN_PACKETS]  # the writer's own header, the first packet whole, then payloads
    uint8_t saved[CHAIN_HEADERS]  # the first packet's headers before chain_finish()


cdef struct Coalescer:
    int count
    bint tcp                # merge TCP
    bint udp                # merge UDP, which takes a kernel with USO (6.2)
    int newest[BUCKETS]     # by flow, NO_CHAIN if none
    Chain chains[CHAINS]


cdef inline void coalesce_reset(Coalescer *all) noexcept nogil:
    cdef int i
    for i in range(all.count):
        all.newest[all.chains[i].flow % BUCKETS] = NO_CHAIN
    all.count = 0


cdef inline uint16_t pseudo_sum(const Frame *info) noexcept nogil:
    """The pseudo-header's folded raw sum: what a partial checksum field holds."""
    cdef uint32_t length = info.packet_length - info.header_length
    cdef uint64_t total = <uint64_t> raw16(<uint16_t> length) + raw16(info.protocol)
    return sum_fold(sum_add(info.source, 8 if info.family == 4 else 32, total))


cdef inline bint transport_checksum_holds(const Frame *info) noexcept nogil:
    """The TCP or UDP checksum over the packet, pseudo-header included."""
    cdef uint32_t length = info.packet_length - info.header_length
    return sum_fold(sum_add(info.packet + info.header_length, length, pseudo_sum(info))) == 0xFFFF


cdef inline bint has_transport_checksum(const Frame *info) noexcept nogil:
    """A whole TCP or UDP header behind the IP header, and a checksum in it."""
    cdef uint32_t length = info.packet_length - info.header_length
    cdef const uint8_t *transport = info.packet + info.header_length
    if info.is_fragment:
        return False
    if info.protocol == PROTOCOL_TCP:
        return length >= TCP_HEADER
    return (
        info.protocol == PROTOCOL_UDP
        and length >= UDP_HEADER
        and load16(transport + UDP_LENGTH) == length
        and load16(transport + UDP_CHECKSUM) != 0  # RFC 768: none was made
    )


cdef inline bint checksum_is_partial(const Frame *info) noexcept nogil:
    cdef int at = TCP_CHECKSUM if info.protocol == PROTOCOL_TCP else UDP_CHECKSUM
    cdef uint16_t sum
    if not has_transport_checksum(info):
        return False
    sum = pseudo_sum(info)
    if memcmp(info.packet + info.header_length + at, &sum, 2) != 0:
        return False
    return not transport_checksum_holds(info)


cdef inline uint32_t mergeable_headers(const Coalescer *all, const Frame *info) noexcept nogil:
    """Bytes of IP and transport header if the packet may be in a chain at all, else 0."""
    cdef const uint8_t *transport = info.packet + info.header_length
    cdef uint32_t length = info.packet_length - info.header_length
    cdef uint32_t own
    if info.is_fragment:
        return 0
    if info.family == 4:
        if info.header_length != IPV4_HEADER:
            return 0  # IPv4 options may mean something in each packet
        if sum_fold(sum_add(info.packet, IPV4_HEADER, 0)) != 0xFFFF:
            return 0  # a superframe's header is made anew: its checksum would be right
    if info.protocol == PROTOCOL_TCP and all.tcp and length >= TCP_HEADER:
        own = (transport[TCP_DATA_OFFSET] >> 4) * 4
        if own < TCP_HEADER or own >= length:
            return 0  # without payload there is nothing to append
        if transport[TCP_FLAGS] & ~(TCP_PSH | TCP_ECE) != TCP_ACK:
            return 0  # SYN, FIN, RST, URG and CWR each mark one packet
        return info.header_length + own
    if info.protocol == PROTOCOL_UDP and all.udp and length > UDP_HEADER:
        if load16(transport + UDP_LENGTH) != length or load16(transport + UDP_CHECKSUM) == 0:
            return 0
        return info.header_length + UDP_HEADER
    return 0


cdef inline bint same_ip(const Chain *chain, const Frame *info) noexcept nogil:
    """Equal in everything that a superframe says once: addresses, ToS, TTL, DF, flow label."""
    cdef const uint8_t *a = chain.first.packet
    cdef const uint8_t *b = info.packet
    if info.family != chain.first.family or info.protocol != chain.first.protocol:
        return False
    if info.family == 6:
        return (
            memcmp(a, b, 4) == 0
            and a[IPV6_HOP_LIMIT] == b[IPV6_HOP_LIMIT]
            and memcmp(a + IPV6_SOURCE, b + IPV6_SOURCE, 32) == 0
        )
    if memcmp(a, b, 2) != 0 or a[IPV4_TTL] != b[IPV4_TTL] or memcmp(a + IPV4_SOURCE, b + IPV4_SOURCE, 8) != 0:
        return False
    if a[IPV4_FRAGMENT] != b[IPV4_FRAGMENT]:
        return False
    # Without DF a router may fragment, and the ID must stay what it was: cutting counts upwards.
    return b[IPV4_FRAGMENT] & IPV4_DONT_FRAGMENT != 0 or load16(b + IPV4_ID) == <uint16_t> (
        load16(a + IPV4_ID) + chain.packets
    )


cdef inline bint same_tcp(const Chain *chain, const Frame *info) noexcept nogil:
    """The next bytes of the stream, under the same acknowledgement, window and options."""
    cdef const uint8_t *a = chain.first.packet + chain.first.header_length
    cdef const uint8_t *b = info.packet + info.header_length
    cdef uint32_t options = chain.headers - chain.first.header_length - TCP_HEADER
    return (
        memcmp(a, b, 4) == 0
        and load32(b + TCP_SEQUENCE) == chain.next_sequence
        and memcmp(a + TCP_ACKNOWLEDGEMENT, b + TCP_ACKNOWLEDGEMENT, 5) == 0
        and (chain.last_flags ^ b[TCP_FLAGS]) & ~TCP_PSH == 0
        and memcmp(a + TCP_WINDOW, b + TCP_WINDOW, 2) == 0
        and memcmp(a + TCP_URGENT, b + TCP_URGENT, 2 + options) == 0
    )


cdef inline bint chain_accepts(
    Chain *chain, const Frame *info, uint32_t headers, uint32_t payload, bint partial
) noexcept nogil:
    if chain.closed or chain.headers != headers or payload > chain.size:
        return False
    if chain.packets == CHAIN_PACKETS or headers + chain.payload + payload > CHAIN_BYTES:
        return False
    if not same_ip(chain, info):
        return False
    if info.protocol == PROTOCOL_TCP:
        if not same_tcp(chain, info):
            return False
    elif memcmp(chain.first.packet + chain.first.header_length, info.packet + info.header_length, 4) != 0:
        return False
    if not chain.verified and not transport_checksum_holds(&chain.first):
        chain.closed = True
        return False
    chain.verified = True
    return partial or transport_checksum_holds(info)


cdef inline bint hides_ports(const Frame *info) noexcept nogil:
    """Fragments and IPv6 extension headers: the packet may be of any flow between its addresses."""
    return info.is_fragment or (
        info.family == 6 and info.protocol in (PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, PROTOCOL_DESTINATION)
    )


cdef inline void close_between(Coalescer *all, const Frame *info) noexcept nogil:
    """Let no packet between these addresses join a chain that began before now."""
    cdef Chain *chain
    cdef int i
    for i in range(all.count):
        chain = &all.chains[i]
        if chain.first.family == info.family and memcmp(
            chain.first.source, info.source, 8 if info.family == 4 else 32
        ) == 0:
            chain.closed = True


cdef inline Chain *chain_begin(
    Coalescer *all, const Frame *info, uint16_t slot, uint32_t flow
) noexcept nogil:
    """A chain of this packet alone, that nothing may join yet; NULL if there is no room."""
    cdef Chain *chain
    if all.count == CHAINS:
        return NULL
    chain = &all.chains[all.count]
    all.newest[flow % BUCKETS] = all.count
    all.count += 1
    chain.first = info[0]
    chain.flow = flow
    chain.packets = 1
    chain.superframe = 0
    chain.partial = False
    chain.slot = slot
    chain.closed = True
    chain.pieces[1].iov_base = info.packet
    chain.pieces[1].iov_len = info.packet_length
    return chain


cdef inline bint coalesce_add(
    Coalescer *all, const Frame *info, uint16_t slot, bint said_partial
) noexcept nogil:
    """Take the packet into a chain; False if there is no room: finish all chains, then add again.
    `said_partial`: its sender says that its checksum is partial, under an outer one that was right."""
    cdef uint32_t headers = mergeable_headers(all, info)
    cdef uint32_t payload = info.packet_length - headers
    cdef bint partial = said_partial or checksum_is_partial(info)
    cdef uint32_t flow = flow_hash(info)
    cdef int newest = all.newest[flow % BUCKETS]
    cdef Chain *chain
    cdef const uint8_t *transport = info.packet + info.header_length
    if newest != NO_CHAIN and headers:
        chain = &all.chains[newest]
        if (
            chain.flow == flow
            and chain.slot == slot
            and chain_accepts(chain, info, headers, payload, partial)
        ):
            chain.packets += 1
            chain.pieces[chain.packets].iov_base = info.packet + headers
            chain.pieces[chain.packets].iov_len = payload
            chain.payload += payload
            chain.next_sequence += payload
            chain.closed = payload < chain.size
            if info.protocol == PROTOCOL_TCP and transport[TCP_FLAGS] & TCP_PSH:
                chain.last_flags |= TCP_PSH
                chain.closed = True
            return True
    if hides_ports(info):
        close_between(all, info)
    chain = chain_begin(all, info, slot, flow)
    if chain == NULL:
        return False
    chain.headers = headers
    chain.size = payload
    chain.payload = payload
    chain.partial = partial
    chain.verified = partial
    chain.closed = headers == 0
    if headers and info.protocol == PROTOCOL_TCP:
        chain.next_sequence = load32(transport + TCP_SEQUENCE) + payload
        chain.last_flags = transport[TCP_FLAGS]
        chain.closed = transport[TCP_FLAGS] & TCP_PSH != 0
    return True


cdef inline VnetHeader chain_offload(const Chain *chain, uint32_t headers, uint32_t size) noexcept nogil:
    """How to cut a superframe with the chain's first headers into segments of `size` payload bytes."""
    cdef VnetHeader offload
    if chain.first.protocol == PROTOCOL_UDP:
        offload.gso_type = VIRTIO_GSO_UDP_L4
        offload.checksum_offset = UDP_CHECKSUM
    else:
        offload.gso_type = VIRTIO_GSO_TCPV4 if chain.first.family == 4 else VIRTIO_GSO_TCPV6
        offload.checksum_offset = TCP_CHECKSUM
    offload.flags = VIRTIO_NEEDS_CSUM
    offload.header_length = <uint16_t> (ETHERNET_HEADER + headers)
    offload.gso_size = <uint16_t> size
    offload.checksum_start = ETHERNET_HEADER + chain.first.header_length
    return offload


cdef inline VnetHeader chain_finish(Chain *chain) noexcept nogil:
    """Make the first packet's headers those of the superframe (of two or more), and say how to cut it."""
    cdef VnetHeader offload = chain_offload(chain, chain.headers, chain.size)
    cdef uint8_t *packet = chain.first.packet
    cdef uint8_t *transport = packet + chain.first.header_length
    cdef uint32_t length = chain.headers + chain.payload
    cdef uint16_t sum
    memcpy(chain.saved, packet, chain.headers)
    chain.first.packet_length = length
    if chain.first.family == 4:
        ipv4_set_length(packet, chain.first.header_length, <uint16_t> length)
    else:
        store16(packet + IPV6_LENGTH, <uint16_t> (length - IPV6_HEADER))
    if chain.first.protocol == PROTOCOL_TCP:
        transport[TCP_FLAGS] = chain.last_flags
    else:
        store16(transport + UDP_LENGTH, <uint16_t> (length - chain.first.header_length))
    sum = pseudo_sum(&chain.first)
    memcpy(transport + offload.checksum_offset, &sum, 2)
    return offload


cdef inline void chain_restore(Chain *chain) noexcept nogil:
    """Undo chain_finish(), to write the packets one by one: each lies whole where it was received."""
    memcpy(chain.first.packet, chain.saved, chain.headers)


cdef inline Frame chain_packet(const Chain *chain, int k) noexcept nogil:
    """The k-th packet (1 is the first) of a restored chain: behind the first, headers lie before
    each payload."""
    cdef Frame info = chain.first
    cdef ptrdiff_t source = chain.first.source - chain.first.packet
    info.packet_length = <uint32_t> chain.pieces[k].iov_len
    if k > 1:
        info.packet = <uint8_t *> chain.pieces[k].iov_base - chain.headers
        info.packet_length += chain.headers
    info.source = info.packet + source
    return info


cdef inline VnetHeader packet_offload(const Frame *info, bint partial) noexcept nogil:
    """How to treat a packet that is no superframe."""
    cdef VnetHeader offload
    memset(&offload, 0, sizeof(offload))
    if partial:
        offload.flags = VIRTIO_NEEDS_CSUM
        offload.checksum_start = ETHERNET_HEADER + info.header_length
        offload.checksum_offset = TCP_CHECKSUM if info.protocol == PROTOCOL_TCP else UDP_CHECKSUM
    return offload


# A local peer's kernel hands over a TCP superframe whole: one datagram, far longer than a packet may
# be, its checksum perhaps only the pseudo-header's sum because no wire was ever crossed.

cdef inline int superframe_headers(const Frame *info) noexcept nogil:
    """Bytes of IP and TCP header of a packet that can be cut anew, else 0: only TCP can, since a
    datagram's boundaries are part of what it says."""
    cdef uint32_t length = info.packet_length - info.header_length
    cdef uint32_t own
    if info.protocol != PROTOCOL_TCP or info.is_fragment or length <= TCP_HEADER:
        return 0
    own = (info.packet[info.header_length + TCP_DATA_OFFSET] >> 4) * 4
    return info.header_length + own if TCP_HEADER <= own < length else 0


cdef inline bint superframe_checksum(const Frame *info) noexcept nogil:
    """Make the checksum a partial one; False if it is neither partial nor right."""
    cdef uint8_t *field = info.packet + info.header_length + TCP_CHECKSUM
    cdef uint16_t sum = pseudo_sum(info)
    # No second look at one that is the sum already: as of 64 KiB that costs, and gains one in 65,536.
    if memcmp(field, &sum, 2) != 0 and not transport_checksum_holds(info):
        return False
    memcpy(field, &sum, 2)
    return True


cdef inline bint coalesce_superframe(
    Coalescer *all, const Frame *info, uint16_t slot, uint32_t headers, uint16_t size
) noexcept nogil:
    """Take a packet that is a superframe already; False if there is no room."""
    cdef Chain *chain = chain_begin(all, info, slot, flow_hash(info))
    if chain == NULL:
        return False
    chain.headers = headers
    chain.superframe = size
    return True
