"""encap (TAP to UDP) and decap (UDP to TAP): the two journeys, bounded by a budget, without the GIL."""

import os
import socket

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from fastpath.drops cimport (
    DROP_ECN_CE_NOT_ECT,
    DROP_FRAME_NOT_FOR_ROUTER,
    DROP_FRAME_SHORT,
    DROP_INNER_DESTINATION,
    DROP_INNER_SOURCE,
    DROP_NO_ROUTE,
    DROP_OUTER_OVERSIZE,
    DROP_TAP_ERROR,
    DROP_TAP_FULL,
    DROP_TOO_BIG,
    DROP_UDP_ERROR,
    DROP_UDP_FULL,
    DROP_UNKNOWN_PEER,
    DROP_VIRTIO_HEADER,
    DROP_VNI_UNKNOWN,
    count_drop,
    drops_by_name,
)
from fastpath.kernel.tap cimport tap_read, tap_write
from fastpath.kernel.udp cimport (
    RECEIVE_STRIDE,
    receive_batch,
    received,
    send_batch,
    send_describe,
)
from fastpath.linux cimport (
    AF_INET,
    EAGAIN,
    EINTR,
    EINVAL,
    EIO,
    EMSGSIZE,
    ENOBUFS,
)
from fastpath.offload.plan cimport RUN_MAX_SEGMENTS, run_accepts, run_begin, run_extend
from fastpath.offload.virtio cimport (
    VIRTIO_GSO_NONE,
    VIRTIO_HEADER,
    VnetHeader,
    virtio_complete_checksum,
    virtio_decode,
)
from fastpath.table cimport GENEVE, LOCAL, NO_SLOT, VXLAN, Peer
from fastpath.wire.byteorder cimport store16
from fastpath.wire.classify cimport Frame, classify_frame, flow_hash
from fastpath.wire.ethernet cimport ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from fastpath.wire.geneve cimport geneve_decode
from fastpath.wire.ip cimport ECN_MASK, ecn_combine, ipv4_set_ecn, ipv6_set_ecn
from fastpath.wire.vxlan cimport vxlan_decode

# Both encapsulations begin with eight bytes: Geneve as we send it has no options.
cdef enum:
    TUNNEL_HEADER = 8


cdef inline iovec piece(void *base, size_t length) noexcept nogil:
    cdef iovec made
    made.iov_base = base
    made.iov_len = length
    return made


cdef class Pump:
    """The two journeys: encap (TAP to UDP) and decap (UDP to TAP). Borrows its descriptors."""

    def __cinit__(self):
        self.arena = <uint8_t *> malloc(ARENA_BYTES)
        self.outbox = <Outbox *> calloc(1, sizeof(Outbox))
        self.inbox = <ReceiveBatch *> calloc(1, sizeof(ReceiveBatch))
        if self.arena == NULL or self.outbox == NULL or self.inbox == NULL:
            raise MemoryError
        self.inbox.buffers = <uint8_t *> malloc(<size_t> BATCH * RECEIVE_STRIDE)
        if self.inbox.buffers == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.inbox != NULL:
            free(self.inbox.buffers)
        free(self.inbox)
        free(self.outbox)
        free(self.arena)

    def __init__(
        self,
        *,
        int tap_fd,
        int vnet_header_size,
        bytes router_mac not None,
        bytes gateway_mac not None,
        vni,
        PrefixTable prefixes not None,
        PeerTable peers not None,
        str vxlan_reserved_bits="strict",
    ):
        if not VIRTIO_HEADER <= vnet_header_size <= 24:
            raise ValueError(f"vnet_header_size: {vnet_header_size} is not in {VIRTIO_HEADER}..24")
        if len(router_mac) != 6 or len(gateway_mac) != 6:
            raise ValueError("router_mac, gateway_mac: 6 bytes each")
        if not 0 <= vni < 1 << 24:
            raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
        if vxlan_reserved_bits not in ("strict", "rfc"):
            raise ValueError(f"vxlan_reserved_bits: {vxlan_reserved_bits!r} is neither 'strict' nor 'rfc'")
        self.tap_fd = tap_fd
        self.vnet_size = vnet_header_size
        self.vni = vni
        self.vxlan_strict = vxlan_reserved_bits == "strict"
        self.max_segments = RUN_MAX_SEGMENTS
        self.prefixes = prefixes
        self.peers = peers
        memcpy(self.router_mac, <const uint8_t *> router_mac, 6)
        memcpy(self.delivery_header + vnet_header_size, <const uint8_t *> gateway_mac, 6)
        memcpy(self.delivery_header + vnet_header_size + 6, <const uint8_t *> router_mac, 6)

    def add_receiver(self, int fd, str encapsulation not None):
        """A bound, non-blocking UDP socket whose datagrams are "geneve" or "vxlan"."""
        if encapsulation not in ("geneve", "vxlan"):
            raise ValueError(f"encapsulation: {encapsulation!r} is neither 'geneve' nor 'vxlan'")
        if self.receiver_count == RECEIVERS:
            raise ValueError(f"receivers: no more than {RECEIVERS}")
        self.receivers[self.receiver_count] = Receiver(fd, GENEVE if encapsulation == "geneve" else VXLAN)
        self.receiver_count += 1

    def add_sender(self, int fd, int family):
        """A non-blocking UDP socket for sending to AF_INET or AF_INET6 peers."""
        cdef Senders *senders
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise ValueError(f"family: {family} is neither AF_INET nor AF_INET6")
        senders = &self.senders4 if family == AF_INET else &self.senders6
        if senders.count == SENDERS:
            raise ValueError(f"senders: no more than {SENDERS} of a family")
        senders.fds[senders.count] = fd
        senders.count += 1

    def encap(self, int budget=256):
        """Read up to `budget` frames from the TAP and send them; how many were read."""
        cdef int n
        with nogil:
            n = self.run_encap(budget)
        if n < 0:
            raise OSError(-n, f"reading the TAP: {os.strerror(-n)}")
        return n

    def decap(self, int fd, int budget=BATCH):
        """Receive up to `budget` messages from one receiver and deliver them; how many were received."""
        cdef Receiver *receiver = NULL
        cdef int i, n
        for i in range(self.receiver_count):
            if self.receivers[i].fd == fd:
                receiver = &self.receivers[i]
        if receiver == NULL:
            raise KeyError(f"descriptor {fd} is no receiver")
        with nogil:
            n = self.run_decap(receiver, min(budget, BATCH))
        if n < 0:
            raise OSError(-n, f"receiving datagrams: {os.strerror(-n)}")
        return n

    def counters(self):
        """What each direction received, forwarded and dropped, by reason."""
        return {"encap": counters_dict(&self.encap_counters), "decap": counters_dict(&self.decap_counters)}

    def drops(self):
        """{"encap": {reason: n}, "decap": {reason: n}}, every reason present."""
        return {"encap": drops_by_name(&self.encap_counters), "decap": drops_by_name(&self.decap_counters)}

    # encap ----------------------------------------------------------------------------------------

    cdef int run_encap(self, int budget) noexcept nogil:
        cdef size_t used = 0
        cdef ssize_t n = 0
        cdef int frames = 0
        cdef int drop
        cdef uint8_t *buffer
        while frames < budget:
            if used + HEADROOM + FRAME_BYTES > ARENA_BYTES:
                self.flush()
                used = 0
            buffer = self.arena + used + HEADROOM
            n = tap_read(self.tap_fd, buffer, FRAME_BYTES)
            if n <= 0:
                break
            frames += 1
            self.encap_counters.received += 1
            drop = self.encap_frame(buffer, n)
            if drop:
                count_drop(&self.encap_counters, drop, 1)
            else:
                used += (HEADROOM + n + 63) & ~63
        self.flush()
        if n < 0 and n != -EAGAIN and n != -EINTR and frames == 0:
            return <int> n
        return frames

    cdef int encap_frame(self, uint8_t *buffer, size_t length) noexcept nogil:
        """Post the frame's datagram; 0 or the Drop. The frame stays in the arena until flush()."""
        cdef uint8_t *frame = buffer + self.vnet_size
        cdef VnetHeader offload
        cdef Frame info
        cdef Peer *peer
        cdef int source, slot, drop
        cdef size_t size
        if length < <size_t> self.vnet_size + ETHERNET_HEADER:
            return DROP_FRAME_SHORT
        if memcmp(frame, self.router_mac, 6) != 0:
            return DROP_FRAME_NOT_FOR_ROUTER
        drop = classify_frame(frame, length - self.vnet_size, &info)
        if drop:
            return drop
        if info.family == 4:
            source = self.prefixes.find4(info.source)
            slot = self.prefixes.find4(info.destination)
        else:
            source = self.prefixes.find6(info.source)
            slot = self.prefixes.find6(info.destination)
        if source != LOCAL:
            return DROP_INNER_SOURCE
        if slot == LOCAL:
            return DROP_INNER_DESTINATION
        if slot == NO_SLOT:
            return DROP_NO_ROUTE
        peer = &self.peers.slots[slot]
        if info.packet_length > peer.mtu:
            return DROP_TOO_BIG
        size = ETHERNET_HEADER + info.packet_length
        offload = virtio_decode(buffer)
        if offload.gso_type != VIRTIO_GSO_NONE:
            return DROP_VIRTIO_HEADER  # no segmentation was offered to the kernel
        drop = virtio_complete_checksum(&offload, frame, size)
        if drop:
            return drop
        # From here on the virtio header is overwritten: the tunnel header ends where the frame begins.
        memcpy(frame - TUNNEL_HEADER, peer.header, sizeof(peer.header))
        memcpy(frame + 6, self.router_mac, 6)
        return self.post(
            slot, flow_hash(&info), info.tos & ECN_MASK, frame - TUNNEL_HEADER, TUNNEL_HEADER + size
        )

    cdef int post(self, int slot, uint32_t flow, int ecn, uint8_t *datagram, size_t length) noexcept nogil:
        """Put one datagram in the outbox, in the newest run if it may join it; 0 or the Drop."""
        cdef Outbox *outbox = self.outbox
        cdef Peer *peer = &self.peers.slots[slot]
        cdef Senders *senders = &self.senders4 if peer.family == AF_INET else &self.senders6
        cdef uint32_t key
        cdef Run *run
        if senders.count == 0:
            return DROP_UDP_ERROR  # no address of ours in the peer's family
        # slot (16 bits), sender (8), ECN (2): what a run's datagrams have in common.
        key = (<uint32_t> slot << 10) | (flow % senders.count << 2) | <uint32_t> ecn
        if outbox.piece_count == OUTBOX_PIECES:
            self.flush()
        run = &outbox.runs[outbox.run_count - 1]
        if outbox.run_count and run_accepts(run, key, <uint32_t> length, self.max_segments):
            run_extend(run, <uint32_t> length)
        else:
            if outbox.run_count == BATCH:
                self.flush()
            run = &outbox.runs[outbox.run_count]
            run_begin(run, key, <uint32_t> length)
            outbox.first_piece[outbox.run_count] = outbox.piece_count
            outbox.run_count += 1
        outbox.pieces[outbox.piece_count] = piece(datagram, length)
        outbox.piece_count += 1
        return 0

    cdef void flush(self) noexcept nogil:
        """Send the outbox's runs in order, each once, and empty it."""
        cdef Outbox *outbox = self.outbox
        cdef int first = 0
        cdef int last, sent
        cdef int sender[BATCH]
        cdef int i
        for i in range(outbox.run_count):
            sender[i] = describe_run(self, i)
        while first < outbox.run_count:
            last = first + 1
            while last < outbox.run_count and sender[last] == sender[first]:
                last += 1
            sent = send_batch(sender[first], &outbox.batch, first, last - first)
            if sent > 0:
                for i in range(first, first + sent):
                    count_sent(self, &outbox.runs[i], outbox.runs[i].count, outbox.runs[i].bytes)
                first += sent
                continue
            if (sent == -EIO or sent == -EINVAL) and outbox.runs[first].count > 1:
                # UDP_SEGMENT refused on this route: its datagrams leave one by one, and so do all
                # later ones (design: downgrade, replay only what failed).
                self.max_segments = 1
                send_singly(self, first, sender[first])
            else:
                count_drop(&self.encap_counters, send_drop(sent), outbox.runs[first].count)
            first += 1
        outbox.run_count = 0
        outbox.piece_count = 0

    # decap ----------------------------------------------------------------------------------------

    cdef int run_decap(self, Receiver *receiver, int budget) noexcept nogil:
        cdef int n = receive_batch(receiver.fd, self.inbox, budget)
        cdef int i
        cdef Received message
        if n < 0:
            return 0 if n == -EAGAIN or n == -EINTR else n
        for i in range(n):
            message = received(self.inbox, i)
            self.decap_message(receiver, &message)
        return n

    cdef void decap_message(self, Receiver *receiver, Received *message) noexcept nogil:
        """One datagram, or a GRO train of them from one source."""
        cdef Counters *counters = &self.decap_counters
        cdef uint32_t at = 0
        cdef uint32_t length, count
        cdef int slot, drop
        count = 1 if message.length == 0 else (message.length + message.segment - 1) // message.segment
        counters.received += count
        if message.truncated:
            count_drop(counters, DROP_OUTER_OVERSIZE, count)
            return
        if message.family == AF_INET:
            slot = self.peers.sources.find4(message.source)
        else:
            slot = self.peers.sources.find6(message.source)
        if slot == NO_SLOT:
            count_drop(counters, DROP_UNKNOWN_PEER, count)
            return
        while count:
            length = min(message.segment, message.length - at)
            drop = self.decap_datagram(
                receiver, slot, message.data + at, length, message.tos & ECN_MASK
            )
            if drop:
                count_drop(counters, drop, 1)
            at += length
            count -= 1

    cdef int decap_datagram(
        self, Receiver *receiver, int slot, uint8_t *datagram, size_t length, int outer_ecn
    ) noexcept nogil:
        """Deliver the datagram's packet; 0 or the Drop."""
        cdef uint32_t vni = 0
        cdef uint8_t *frame
        cdef Frame info
        cdef Peer *peer
        cdef int header, drop, source, destination, ecn
        if receiver.encapsulation == GENEVE:
            header = geneve_decode(datagram, length, &vni)
        else:
            header = vxlan_decode(datagram, length, self.vxlan_strict, &vni)
        if header < 0:
            return -header
        if vni != self.vni:
            return DROP_VNI_UNKNOWN
        frame = datagram + header
        length -= header
        if length < ETHERNET_HEADER:
            return DROP_FRAME_SHORT
        if memcmp(frame, self.router_mac, 6) != 0:
            return DROP_FRAME_NOT_FOR_ROUTER
        drop = classify_frame(frame, length, &info)
        if drop:
            return drop
        if info.family == 4:
            source = self.prefixes.find4(info.source)
            destination = self.prefixes.find4(info.destination)
        else:
            source = self.prefixes.find6(info.source)
            destination = self.prefixes.find6(info.destination)
        if source != slot:
            return DROP_INNER_SOURCE
        if destination != LOCAL:
            return DROP_INNER_DESTINATION
        ecn = ecn_combine(info.tos & ECN_MASK, outer_ecn)
        if ecn < 0:
            return DROP_ECN_CE_NOT_ECT
        if ecn != info.tos & ECN_MASK:
            if info.family == 4:
                ipv4_set_ecn(info.packet, ecn)
            else:
                ipv6_set_ecn(info.packet, ecn)
        drop = self.deliver(info.packet, info.packet_length, info.family)
        if drop:
            return drop
        peer = &self.peers.slots[slot]
        peer.decap_packets += 1
        peer.decap_bytes += info.packet_length
        self.decap_counters.forwarded += 1
        self.decap_counters.forwarded_bytes += info.packet_length
        return 0

    cdef int deliver(self, uint8_t *packet, size_t length, int family) noexcept nogil:
        """Write one packet to the TAP as a frame from the virtual router to the gateway."""
        cdef iovec pieces[2]
        cdef ssize_t n
        store16(
            self.delivery_header + self.vnet_size + ETHERNET_HEADER - 2,
            ETHERTYPE_IPV4 if family == 4 else ETHERTYPE_IPV6,
        )
        pieces[0] = piece(self.delivery_header, self.vnet_size + ETHERNET_HEADER)
        pieces[1] = piece(packet, length)
        n = tap_write(self.tap_fd, pieces, 2)
        if n >= 0:
            return 0
        return DROP_TAP_FULL if n == -EAGAIN or n == -ENOBUFS else DROP_TAP_ERROR


cdef inline int send_drop(int failure) noexcept nogil:
    if failure == -EAGAIN or failure == -ENOBUFS:
        return DROP_UDP_FULL
    return DROP_TOO_BIG if failure == -EMSGSIZE else DROP_UDP_ERROR


cdef int describe_run(Pump pump, int i) noexcept nogil:
    """Fill message i for run i; the descriptor to send it from."""
    cdef Outbox *outbox = pump.outbox
    cdef Run *run = &outbox.runs[i]
    cdef Peer *peer = &pump.peers.slots[run.key >> 10]
    cdef Senders *senders = &pump.senders4 if peer.family == AF_INET else &pump.senders6
    send_describe(
        &outbox.batch,
        i,
        &peer.endpoint,
        peer.endpoint_length,
        &outbox.pieces[outbox.first_piece[i]],
        run.count,
        run.size if run.count > 1 else 0,
        run.key & ECN_MASK,
    )
    return senders.fds[run.key >> 2 & 0xFF]


cdef void count_sent(Pump pump, const Run *run, uint32_t packets, uint64_t datagram_bytes) noexcept nogil:
    cdef Peer *peer = &pump.peers.slots[run.key >> 10]
    cdef uint64_t inner_bytes = datagram_bytes - packets * (TUNNEL_HEADER + ETHERNET_HEADER)
    peer.encap_packets += packets
    peer.encap_bytes += inner_bytes
    pump.encap_counters.forwarded += packets
    pump.encap_counters.forwarded_bytes += inner_bytes


cdef void send_singly(Pump pump, int i, int fd) noexcept nogil:
    """Send run i's datagrams each as a message of its own, in order."""
    cdef Outbox *outbox = pump.outbox
    cdef Run *run = &outbox.runs[i]
    cdef Peer *peer = &pump.peers.slots[run.key >> 10]
    cdef iovec *datagram
    cdef int k, sent
    for k in range(run.count):
        datagram = &outbox.pieces[outbox.first_piece[i] + k]
        send_describe(
            &outbox.batch, i, &peer.endpoint, peer.endpoint_length, datagram, 1, 0, run.key & ECN_MASK
        )
        sent = send_batch(fd, &outbox.batch, i, 1)
        if sent > 0:
            count_sent(pump, run, 1, datagram.iov_len)
        else:
            count_drop(&pump.encap_counters, send_drop(sent), 1)


cdef dict counters_dict(const Counters *counters):
    return {
        "received": counters.received,
        "forwarded": counters.forwarded,
        "forwarded_bytes": counters.forwarded_bytes,
        "drops": drops_by_name(counters),
    }
