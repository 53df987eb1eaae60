"""encap (TAP to UDP) and decap (UDP to TAP): the two journeys, bounded by a budget, without the GIL."""

import os
import socket

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from fastpath.drops cimport (
    DROP_ECN_CE_NOT_ECT,
    DROP_FRAME_NOT_FOR_ROUTER,
    DROP_FRAME_NOT_IP,
    DROP_FRAME_SHORT,
    DROP_INNER_DESTINATION,
    DROP_INNER_SOURCE,
    DROP_NO_ROUTE,
    DROP_OUTER_OVERSIZE,
    DROP_PROBES_FULL,
    DROP_TOO_BIG,
    DROP_TUNNEL_OAM,
    DROP_TUNNEL_OPTIONS,
    DROP_UNKNOWN_PEER,
    DROP_VNI_UNKNOWN,
    count_drop,
    drops_by_name,
)
from fastpath.kernel.poll cimport (
    POLL_EVENTS,
    poll_add,
    poll_clock,
    poll_close,
    poll_open,
    poll_remove,
    poll_wait,
    poll_yield,
)
from fastpath.kernel.tap cimport tap_read
from fastpath.kernel.udp cimport RECEIVE_STRIDE, receive_batch, received
from fastpath.linux cimport (
    AF_INET,
    EAGAIN,
    EINTR,
    ENOBUFS,
    ENOMEM,
    ENOSYS,
    epoll_event,
)
from fastpath.offload.coalesce cimport has_transport_checksum
from fastpath.offload.plan cimport RUN_MAX_SEGMENTS
from fastpath.offload.segment cimport Superframe, segment_open
from fastpath.offload.virtio cimport (
    VIRTIO_GSO_NONE,
    VIRTIO_HEADER,
    VnetHeader,
    virtio_complete_checksum,
    virtio_covers_transport,
    virtio_decode,
)
from fastpath.probes cimport Roaming
from fastpath.spin cimport spin_again, spin_begin, spin_end
from fastpath.table cimport GENEVE, LOCAL, NO_SLOT, VXLAN, Peer, peer_at
from fastpath.wire.byteorder cimport load16
from fastpath.wire.classify cimport Frame, classify_frame, flow_hash
from fastpath.wire.ethernet cimport ETHERNET_HEADER
from fastpath.wire.geneve cimport geneve_control, geneve_decode
from fastpath.wire.ip cimport ECN_MASK, ecn_combine, ipv4_set_ecn, ipv6_set_ecn
from fastpath.wire.probe cimport PROBE_BYTES, is_probe, is_roaming, probe_encode
from fastpath.wire.vxlan cimport vxlan_decode


cdef class Pump:
    """The two journeys: encap (TAP to UDP) and decap (UDP to TAP). Borrows its descriptors."""

    def __cinit__(self):
        self.poll_fd = poll_open()
        if self.poll_fd < 0:
            raise OSError(-self.poll_fd, os.strerror(-self.poll_fd))
        self.arena = <uint8_t *> malloc(ARENA_BYTES)
        self.inbox = <ReceiveBatch *> calloc(1, sizeof(ReceiveBatch))
        if self.arena == NULL or self.inbox == NULL:
            raise MemoryError
        self.inbox.buffers = <uint8_t *> malloc(<size_t> BATCH * RECEIVE_STRIDE)
        if self.inbox.buffers == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.inbox != NULL:
            free(self.inbox.buffers)
        free(self.inbox)
        free(self.arena)
        if self.poll_fd >= 0:
            poll_close(self.poll_fd)

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
        mtu=65535,
    ):
        if not VIRTIO_HEADER <= vnet_header_size <= 24:
            raise ValueError(f"vnet_header_size: {vnet_header_size} is not in {VIRTIO_HEADER}..24")
        if len(router_mac) != 6 or len(gateway_mac) != 6:
            raise ValueError("router_mac, gateway_mac: 6 bytes each")
        if not 0 <= vni < 1 << 24:
            raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
        if vxlan_reserved_bits not in ("strict", "rfc"):
            raise ValueError(f"vxlan_reserved_bits: {vxlan_reserved_bits!r} is neither 'strict' nor 'rfc'")
        self.set_mtu(mtu)
        self.tap_fd = tap_fd
        self.vnet_size = vnet_header_size
        self.vni = vni
        self.vxlan_strict = vxlan_reserved_bits == "strict"
        self.prefixes = prefixes
        self.peers = peers
        memcpy(self.router_mac, <const uint8_t *> router_mac, 6)
        self.sender = Sender(peers)
        self.sender.counters = &self.encap_counters
        self.writer = Writer(tap_fd, vnet_header_size, router_mac, gateway_mac, peers)
        self.writer.counters = &self.decap_counters
        self.probes = Probes()
        watch(self, tap_fd)

    def add_receiver(self, int fd, str encapsulation not None):
        """A bound, non-blocking UDP socket whose datagrams are "geneve" or "vxlan"."""
        if encapsulation not in ("geneve", "vxlan"):
            raise ValueError(f"encapsulation: {encapsulation!r} is neither 'geneve' nor 'vxlan'")
        if self.receiver_count == RECEIVERS:
            raise ValueError(f"receivers: no more than {RECEIVERS}")
        watch(self, fd)
        self.receivers[self.receiver_count] = Receiver(
            fd, GENEVE if encapsulation == "geneve" else VXLAN, BATCH
        )
        self.receiver_count += 1
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                self.sender.add_home(fd, sock.family, GENEVE if encapsulation == "geneve" else VXLAN)

    def add_sender(self, int fd, int family):
        """A non-blocking UDP socket for sending to AF_INET or AF_INET6 peers."""
        self.sender.add_socket(fd, family)

    def forget_sockets(self):
        """Receive and send by none any more, until some are added again."""
        cdef int i
        for i in range(self.receiver_count):
            poll_remove(self.poll_fd, self.receivers[i].fd)
        self.receiver_count = 0
        self.sender.forget_sockets()

    def watch_tap(self):
        """Watch the TAP's descriptor again, after another TAP was put in its place (dup2)."""
        watch(self, self.tap_fd)

    def set_mtu(self, mtu):
        """The pods' MTU is another now."""
        if not 576 <= mtu <= 65535:
            raise ValueError(f"mtu: {mtu} is not in 576..65535")
        self.mtu = mtu

    def set_uplink(self, int fd, bytes mac not None):
        """A TAP that takes superframes inside their tunnel: see fastpath/offload/tunnel.pxd."""
        self.sender.set_uplink(fd, mac)

    @property
    def offloads(self):
        """{name: on} of what the pump itself can do without: see set_offload."""
        return {
            "udp_segment": self.sender.max_segments > 1,
            "merge_tcp": bool(self.writer.chains.tcp),
            "merge_udp": bool(self.writer.chains.udp),
            "uplink": bool(self.sender.uplink),
            "spin": bool(self.spin.on),
        }

    def set_offload(self, str name not None, bint on):
        """Switch one offload. A send or write that the kernel refuses switches it off again."""
        if name == "udp_segment":
            self.sender.max_segments = RUN_MAX_SEGMENTS if on else 1
        elif name == "merge_tcp":
            self.writer.chains.tcp = on
        elif name == "merge_udp":
            self.writer.chains.udp = on
        elif name == "uplink":
            if on and self.sender.uplink_fd < 0:
                raise ValueError("name: there is no uplink to switch on")
            self.sender.uplink = on
        elif name == "spin":
            self.spin.on = on
        else:
            raise ValueError(f"name: {name!r} is not one of {', '.join(self.offloads)}")

    def fileno(self):
        """Readable when turn() has something to do. Ours: it closes with the pump."""
        return self.poll_fd

    def turn(self, long idle_microseconds=0):
        """Move what is there, both ways in turns, and wait up to `idle_microseconds` each time for more;
        returns when nothing came, or after a bounded number of rounds. OSError if a descriptor fails."""
        cdef int n
        if not 0 <= idle_microseconds < 1000000:
            raise ValueError(f"idle_microseconds: {idle_microseconds} is not in 0..999999")
        with nogil:
            n = self.run_turn(idle_microseconds)
        if n < 0:
            raise OSError(-n, f"moving packets: {os.strerror(-n)}")

    def encap(self, int budget=ENCAP_BUDGET):
        """Read up to `budget` frames from the TAP and send them; how many were read."""
        cdef int frames = 0
        cdef int n = 1
        with nogil:
            while n > 0 and frames < budget:
                n = self.run_encap(budget - frames)
                frames += max(n, 0)
        if n < 0 and frames == 0:
            raise OSError(-n, f"reading the TAP: {os.strerror(-n)}")
        return frames

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
            n = self.run_decap(receiver, max(0, min(budget, BATCH)))
        if n < 0:
            raise OSError(-n, f"receiving datagrams: {os.strerror(-n)}")
        return n

    def send_probe(self, int slot, uint32_t flow, bytes probe not None, uint32_t packet_bytes=PROBE_BYTES):
        """Send a probe to a peer as a packet of that flow would go, padded with zeroes to `packet_bytes`
        behind its inner Ethernet header; whether the kernel took it. KeyError if the slot is free."""
        cdef uint8_t *frame = self.arena + HEADROOM
        cdef int sent
        if len(probe) != PROBE_BYTES:
            raise ValueError(f"probe: {len(probe)} bytes, {PROBE_BYTES} needed")
        if not PROBE_BYTES <= packet_bytes <= 65535:
            raise ValueError(f"packet_bytes: {packet_bytes} is not in {PROBE_BYTES}..65535")
        if slot == LOCAL or peer_at(self.peers, slot) == NULL:
            raise KeyError(f"slot {slot} holds no peer")
        probe_encode(frame, self.router_mac, <const uint8_t *> probe, packet_bytes - PROBE_BYTES)
        sent = self.sender.send_probe(slot, flow, frame, ETHERNET_HEADER + packet_bytes)
        self.encap_counters.probes += sent == 1
        return sent == 1

    def take_probes(self):
        """[(slot, probe without padding)] of what was heard since the last call, in order: see send_probe."""
        return self.probes.take()

    def hear_roaming(self, bint on):
        """Whether roaming probes are heard. Off at first: then a stranger's are an unknown peer's."""
        self.roaming = on

    def take_roaming_probes(self):
        """[(slot, encapsulation, address, port, probe)] of what was heard since the last call; -1 is
        nobody's slot."""
        return [
            (slot, "geneve" if encapsulation == GENEVE else "vxlan", address, port, probe)
            for slot, encapsulation, address, port, probe in self.probes.take_roaming()
        ]

    def counters(self):
        """What each direction received, forwarded and dropped, by reason."""
        return {"encap": counters_dict(&self.encap_counters), "decap": counters_dict(&self.decap_counters)}

    @property
    def moved_bytes(self):
        """Of packets that were forwarded, either way."""
        return self.encap_counters.forwarded_bytes + self.decap_counters.forwarded_bytes

    def drops(self):
        """{"encap": {reason: n}, "decap": {reason: n}}, every reason present."""
        return {"encap": drops_by_name(&self.encap_counters), "decap": drops_by_name(&self.decap_counters)}

    cdef int run_turn(self, long idle_microseconds) noexcept nogil:
        cdef epoll_event events[POLL_EVENTS]
        cdef int _round, ready, i, k, n
        for _round in range(TURN_ROUNDS):
            if _round:
                ready = self.await_events(events, idle_microseconds)
            else:  # what woke the loop is there already, and tells nothing of how packets follow
                ready = poll_wait(self.poll_fd, events, idle_microseconds)
            if ready == -ENOSYS:  # then without waiting: look at every descriptor once
                return self.look_once()
            if ready <= 0:
                return 0 if ready == -EINTR else ready
            for i in range(ready):
                n = 0
                if events[i].data.fd == self.tap_fd:
                    n = self.run_encap(ENCAP_BUDGET)
                for k in range(self.receiver_count):
                    if events[i].data.fd == self.receivers[k].fd:
                        n = self.run_decap(&self.receivers[k], self.receivers[k].budget)
                if n < 0:
                    return n
        return 0

    cdef int await_events(self, epoll_event *events, long idle_microseconds) noexcept nogil:
        """poll_wait(), after a spin if that pays."""
        cdef int ready = 0
        cdef bint looking = spin_begin(&self.spin, poll_clock())
        while looking and ready == 0:
            ready = poll_wait(self.poll_fd, events, 0)
            if ready == 0:
                poll_yield()
                looking = spin_again(&self.spin, poll_clock())
        if ready == 0:
            ready = poll_wait(self.poll_fd, events, idle_microseconds)
        spin_end(&self.spin, poll_clock(), ready > 0)
        return ready

    cdef int look_once(self) noexcept nogil:
        cdef int k
        cdef int n = self.run_encap(ENCAP_BUDGET)
        for k in range(self.receiver_count):
            if n >= 0:
                n = self.run_decap(&self.receivers[k], self.receivers[k].budget)
        return min(n, 0)

    # encap ----------------------------------------------------------------------------------------

    cdef int run_encap(self, int budget) noexcept nogil:
        cdef size_t used = 0
        cdef ssize_t n = 0
        cdef int frames = 0
        cdef uint32_t packets
        cdef int drop
        cdef uint8_t *buffer
        # One arena's worth at most: then the other direction has its turn.
        while frames < budget and used + HEADROOM + FRAME_BYTES <= ARENA_BYTES:
            buffer = self.arena + used + HEADROOM
            n = tap_read(self.tap_fd, buffer, FRAME_BYTES)
            if n <= 0:
                break
            frames += 1
            packets = 1
            drop = self.encap_frame(buffer, n, &packets)
            self.encap_counters.received += packets
            if drop:
                count_drop(&self.encap_counters, drop, packets)
            else:
                used += (HEADROOM + n + 63) & ~63
        self.sender.flush()
        return <int> n if n < 0 and frames == 0 and not is_passing(<int> n) else frames

    cdef int encap_frame(self, uint8_t *buffer, size_t length, uint32_t *packets) noexcept nogil:
        """Post the frame's datagrams; 0 or the Drop. It stays in the arena until the sender's flush.
        `packets` becomes how many the frame stands for."""
        cdef uint8_t *frame = buffer + self.vnet_size
        cdef VnetHeader offload = virtio_decode(buffer)
        cdef Superframe cut
        cdef Frame info
        cdef Peer *peer
        cdef int source, slot, drop
        cdef uint32_t largest
        cdef bint partial
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
        peer = peer_at(self.peers, slot)
        if peer == NULL:
            return DROP_NO_ROUTE
        largest = info.packet_length
        if offload.gso_type != VIRTIO_GSO_NONE:
            drop = segment_open(&offload, frame, &info, &cut)
            if drop:
                return drop
            packets[0] = cut.count
            largest = cut.headers - ETHERNET_HEADER + min(cut.size, cut.payload)
        if largest > peer.mtu:
            return DROP_TOO_BIG
        memcpy(frame + 6, self.router_mac, 6)
        partial = peer.partial_checksums and virtio_covers_transport(&offload, &info)
        if offload.gso_type != VIRTIO_GSO_NONE:
            return self.sender.post_superframe(slot, flow_hash(&info), info.tos & ECN_MASK, &cut, partial)
        length = ETHERNET_HEADER + info.packet_length
        if not partial:
            drop = virtio_complete_checksum(&offload, frame, length)
            if drop:
                return drop
        return self.sender.post_frame(slot, flow_hash(&info), info.tos & ECN_MASK, frame, length, partial)

    # decap ----------------------------------------------------------------------------------------

    cdef int run_decap(self, Receiver *receiver, int budget) noexcept nogil:
        cdef int n = receive_batch(receiver.fd, self.inbox, budget)
        cdef int i
        cdef Received message
        if n < 0:
            return 0 if is_passing(n) else n
        receiver.budget = BATCH
        for i in range(n):
            message = received(self.inbox, i)
            if message.length > LONG_MESSAGE:
                receiver.budget = LONG_BATCH
            self.decap_message(receiver, &message)
        self.writer.flush()
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
        self.message = message
        self.encapsulation = receiver.encapsulation
        if slot == NO_SLOT:
            if not self.roaming or not self.hear_stranger():
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
        """Hand the datagram's packet to the writer; 0 or the Drop."""
        cdef uint32_t vni = 0
        cdef bint partial = False
        cdef uint8_t *frame
        cdef Frame info
        cdef int header, drop, source, destination, ecn
        if receiver.encapsulation == GENEVE:
            partial = self.peers.slots[slot].partial_checksums
            header = geneve_decode(datagram, length, &vni, &partial)
        else:
            header = vxlan_decode(datagram, length, self.vxlan_strict, &vni)
        if header == -DROP_TUNNEL_OAM:
            return self.decap_control(slot, datagram, length)
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
        if drop == DROP_FRAME_NOT_IP and receiver.encapsulation == VXLAN and is_probe(frame, length):
            return self.hear(slot, frame)
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
        if info.packet_length > self.mtu:
            return self.writer.put_superframe(&info, slot, self.mtu)
        if partial and not has_transport_checksum(&info):
            return DROP_TUNNEL_OPTIONS  # the option speaks of a checksum that is not there
        self.writer.put(&info, slot, partial)
        return 0

    cdef int decap_control(self, int slot, const uint8_t *datagram, size_t length) noexcept nogil:
        """Hear a probe; any other control packet is dropped, whatever else is wrong with it."""
        cdef uint32_t vni = 0
        cdef int header = geneve_control(datagram, &vni)
        cdef const uint8_t *frame
        if header < 0 or vni != self.vni:
            return DROP_TUNNEL_OAM
        frame = datagram + header
        length -= header
        if not is_probe(frame, length) or memcmp(frame, self.router_mac, 6) != 0:
            return DROP_TUNNEL_OAM
        return self.hear(slot, frame)

    cdef bint hear_stranger(self) noexcept nogil:
        """Hear a message of nobody's if it is a roaming probe, after all that is checked of a peer's."""
        cdef uint8_t *datagram = self.message.data
        cdef size_t length = self.message.length
        cdef uint32_t vni = 0
        cdef bint partial = False
        cdef int header
        if length != self.message.segment:
            return False
        if self.encapsulation == VXLAN:
            header = vxlan_decode(datagram, length, self.vxlan_strict, &vni)
        else:
            header = geneve_decode(datagram, length, &vni, &partial)
            header = geneve_control(datagram, &vni) if header == -DROP_TUNNEL_OAM else -DROP_TUNNEL_OAM
        if header < 0 or vni != self.vni:
            return False
        datagram += header
        length -= header
        return (
            is_probe(datagram, length)
            and is_roaming(datagram)
            and memcmp(datagram, self.router_mac, 6) == 0
            and self.hear(NO_SLOT, datagram) == 0
        )

    cdef int hear(self, int slot, const uint8_t *frame) noexcept nogil:
        """Keep a probe for the control plane; 0 or the Drop."""
        cdef const uint8_t *probe = frame + ETHERNET_HEADER
        cdef bint kept
        if is_roaming(frame):
            kept = self.roaming and self.keep_roaming(slot, probe)
        else:
            kept = self.probes.put(slot, probe)
        if not kept:
            return DROP_PROBES_FULL
        self.decap_counters.received -= 1  # it is no packet
        self.decap_counters.probes += 1
        return 0

    cdef bint keep_roaming(self, int slot, const uint8_t *probe) noexcept nogil:
        cdef Roaming *heard = self.probes.next_roaming()
        if heard == NULL:
            return False
        heard.slot = slot
        heard.encapsulation = self.encapsulation
        heard.address_bytes = 4 if self.message.family == AF_INET else 16
        memcpy(heard.address, self.message.source, heard.address_bytes)
        heard.port = load16(self.message.source_port)
        memcpy(heard.probe, probe, PROBE_BYTES)
        return True


cdef inline bint is_passing(int failure) noexcept nogil:
    """Nothing there, or nothing to be had just now: the descriptor itself is sound."""
    return failure in (-EAGAIN, -EINTR, -ENOBUFS, -ENOMEM)


cdef int watch(Pump pump, int fd) except -1:
    cdef int failure = poll_add(pump.poll_fd, fd)
    if failure:
        raise OSError(-failure, os.strerror(-failure))
    return 0


cdef dict counters_dict(const Counters *counters):
    return {
        "received": counters.received,
        "forwarded": counters.forwarded,
        "forwarded_bytes": counters.forwarded_bytes,
        "probes": counters.probes,
        "drops": drops_by_name(counters),
    }
