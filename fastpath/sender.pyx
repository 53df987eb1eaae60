"""Posting datagrams, and sending them in runs."""

import os
import socket

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastpath.drops cimport DROP_TOO_BIG, DROP_UDP_ERROR, DROP_UDP_FULL, count_drop
from fastpath.kernel.tap cimport tap_write
from fastpath.kernel.udp cimport send_batch, send_describe
from fastpath.linux cimport (
    AF_INET,
    EAFNOSUPPORT,
    EAGAIN,
    EBADFD,
    EINVAL,
    EIO,
    EMSGSIZE,
    ENOBUFS,
    sockaddr_in,
    sockaddr_in6,
)
from fastpath.offload.plan cimport RUN_MAX_SEGMENTS, run_accepts, run_begin, run_extend
from fastpath.offload.segment cimport segment_bytes, segment_write
from fastpath.offload.tunnel cimport TUNNEL_INNER_BYTES, tunnel_headers
from fastpath.table cimport GENEVE
from fastpath.wire.byteorder cimport load16
from fastpath.wire.ethernet cimport ETHERNET_HEADER
from fastpath.wire.geneve cimport GENEVE_OAM
from fastpath.wire.ip cimport ECN_MASK

# What the datagrams of a run have in common, in one word: slot (16 bits), socket (8), whether their
# checksum is partial (1), ECN (2).
cdef enum:
    KEY_PARTIAL = 4
    KEY_SOCKET = 3
    KEY_SLOT = 11


cdef class Sender:
    """The sockets of one node, and the outbox before them."""

    def __cinit__(self, PeerTable peers not None):
        self.peers = peers
        self.max_segments = RUN_MAX_SEGMENTS
        self.uplink_fd = -1
        self.outbox = <Outbox *> calloc(1, sizeof(Outbox))
        if self.outbox == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.outbox)

    def add_socket(self, int fd, int family):
        """A non-blocking UDP socket to send from, for peers of its family."""
        cdef Sockets *sockets
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise ValueError(f"family: {family} is neither AF_INET nor AF_INET6")
        sockets = &self.v4 if family == AF_INET else &self.v6
        if sockets.count == SOCKETS:
            raise ValueError(f"senders: no more than {SOCKETS} of a family")
        sockets.fds[sockets.count] = fd
        sockets.count += 1

    def forget_sockets(self):
        """Send from none any more."""
        self.v4.count = self.v6.count = 0
        memset(self.v4.has_home, 0, sizeof(self.v4.has_home))
        memset(self.v6.has_home, 0, sizeof(self.v6.has_home))

    def add_home(self, int fd, int family, int encapsulation):
        """A bound socket that datagrams of the encapsulation come to; the first of its kind is the one."""
        cdef Sockets *sockets = &self.v4 if family == AF_INET else &self.v6
        if not sockets.has_home[encapsulation]:
            sockets.fds[SOCKETS + encapsulation] = fd
            sockets.has_home[encapsulation] = True

    def set_uplink(self, int fd, bytes mac not None):
        """A TAP whose header is TUNNEL_VNET_HEADER bytes, with its MAC. It is used from now on, for
        datagrams that look as if they came from the sockets added so far."""
        cdef uint32_t i
        cdef int home
        if len(mac) != 6:
            raise ValueError(f"mac: {len(mac)} bytes, 6 needed")
        for i in range(self.v4.count):
            self.v4.paths[i] = path_from(self.v4.fds[i], 4)
        for i in range(self.v6.count):
            self.v6.paths[i] = path_from(self.v6.fds[i], 6)
        for home in range(ENCAPSULATIONS):
            if self.v4.has_home[home]:
                self.v4.paths[SOCKETS + home] = path_from(self.v4.fds[SOCKETS + home], 4)
            if self.v6.has_home[home]:
                self.v6.paths[SOCKETS + home] = path_from(self.v6.fds[SOCKETS + home], 6)
        self.uplink_fd = fd
        self.uplink = True
        memcpy(self.uplink_mac, <const uint8_t *> mac, 6)

    cdef uint32_t socket_index(self, const Peer *peer, uint32_t flow) noexcept nogil:
        cdef const Sockets *sockets = &self.v4 if peer.family == AF_INET else &self.v6
        if peer.from_home and sockets.has_home[peer.encapsulation]:
            return SOCKETS + peer.encapsulation
        return flow % sockets.count if sockets.count else 0

    cdef uint32_t key(self, int slot, uint32_t flow, int ecn) noexcept nogil:
        cdef uint32_t index = self.socket_index(&self.peers.slots[slot], flow)
        return <uint32_t> slot << KEY_SLOT | index << KEY_SOCKET | <uint32_t> ecn

    cdef int post_frame(
        self, int slot, uint32_t flow, int ecn, uint8_t *frame, size_t length, bint partial
    ) noexcept nogil:
        """Post a frame whose inner Ethernet source is written; 0 or the Drop. The bytes of a tunnel
        header before it and its destination address are overwritten. `partial`: its checksum is."""
        cdef Peer *peer = &self.peers.slots[slot]
        cdef uint32_t key = self.key(slot, flow, ecn) | (KEY_PARTIAL if partial else 0)
        cdef int before = tunnel_bytes(key)
        if (self.v4.count if peer.family == AF_INET else self.v6.count) == 0:
            return DROP_UDP_ERROR  # we have no address in the peer's family
        write_tunnel(peer, partial, frame - before)
        self._make_room(key, <uint32_t> (before + length), 0)
        self._join(key, frame - before, <uint32_t> (before + length))
        return 0

    cdef int post_superframe(
        self, int slot, uint32_t flow, int ecn, const Superframe *cut, bint partial
    ) noexcept nogil:
        """Post each segment as a datagram; 0 or the Drop, of all or none. `partial`: their checksums
        may stay so."""
        cdef Peer *peer = &self.peers.slots[slot]
        cdef Outbox *outbox = self.outbox
        cdef uint32_t key = self.key(slot, flow, ecn)
        cdef uint32_t before, header_bytes, length, i
        cdef uint8_t *datagram
        cdef ssize_t written
        if (self.v4.count if peer.family == AF_INET else self.v6.count) == 0:
            return DROP_UDP_ERROR
        if self.uplink and cut.tcp and cut.headers + cut.payload <= TUNNEL_INNER_BYTES:
            self.flush()
            written = self._write_uplink(key, ecn, cut)
            if written >= 0:
                self.uplink_refusals = 0
                header_bytes = TUNNEL_HEADER + cut.headers
                self._count(key, cut.count, <uint64_t> cut.count * header_bytes + cut.payload)
                return 0
            if written != -EINVAL and written != -EBADFD and written != -EIO:
                return send_drop(<int> written)
            # Cut it ourselves; and all later ones, if it was not only this frame that was refused, as by a
            # TAP that was deleted or set down.
            self.uplink_refusals += 1
            self.uplink = self.uplink_refusals < UPLINK_REFUSALS
        if partial:
            key |= KEY_PARTIAL
        before = tunnel_bytes(key)
        if outbox.segments_used + cut.count * (before + cut.headers) + cut.payload > SEGMENTS_BYTES:
            self.flush()  # rather than between two of its segments
        for i in range(cut.count):
            length = before + segment_bytes(cut, i)
            self._make_room(key, length, length)
            datagram = outbox.segments + outbox.segments_used
            outbox.segments_used += length
            segment_write(cut, i, datagram + before, partial)
            write_tunnel(peer, partial, datagram)
            self._join(key, datagram, length)
        return 0

    cdef int send_probe(
        self, int slot, uint32_t flow, uint8_t *frame, size_t length
    ) noexcept nogil:
        """Send a probe at once, from the socket that a packet of this flow takes; 1 or -errno. The outbox
        must be empty; what is overwritten is as of post_frame. No packet is counted."""
        cdef Peer *peer = &self.peers.slots[slot]
        cdef Sockets *sockets = &self.v4 if peer.family == AF_INET else &self.v6
        cdef iovec whole
        if sockets.count == 0:
            return -EAFNOSUPPORT
        write_tunnel(peer, False, frame - TUNNEL_HEADER)
        if peer.encapsulation == GENEVE:
            frame[1 - TUNNEL_HEADER] |= GENEVE_OAM
        whole.iov_base = frame - TUNNEL_HEADER
        whole.iov_len = TUNNEL_HEADER + length
        send_describe(&self.outbox.batch, 0, &peer.endpoint, peer.endpoint_length, &whole, 1, 0, 0)
        return send_batch(sockets.fds[self.socket_index(peer, flow)], &self.outbox.batch, 0, 1)

    cdef ssize_t _write_uplink(self, uint32_t key, int ecn, const Superframe *cut) noexcept nogil:
        """Write the superframe in its tunnel, in place; bytes or -errno. What lies before it is
        overwritten, the superframe is not."""
        cdef Peer *peer = &self.peers.slots[key >> KEY_SLOT]
        cdef Sockets *sockets = &self.v4 if peer.family == AF_INET else &self.v6
        cdef OuterPath path = sockets.paths[key >> KEY_SOCKET & 0xFF]
        cdef int before
        cdef iovec whole
        endpoint_to_path(peer, &path)
        memcpy(cut.frame, peer.header + TUNNEL_HEADER, 6)
        before = tunnel_headers(cut, peer.header, &path, self.uplink_mac, ecn)
        whole.iov_base = cut.frame - before
        whole.iov_len = before + cut.headers + cut.payload
        return tap_write(self.uplink_fd, &whole, 1)

    cdef void _make_room(self, uint32_t key, uint32_t length, uint32_t written) noexcept nogil:
        """See to it that one more datagram can join, of which so many bytes are written to the outbox."""
        cdef Outbox *outbox = self.outbox
        if (
            outbox.piece_count == PIECES
            or outbox.segments_used + written > SEGMENTS_BYTES
            or (
                outbox.run_count == BATCH
                and not run_accepts(&outbox.runs[BATCH - 1], key, length, self.max_segments)
            )
        ):
            self.flush()

    cdef void _join(self, uint32_t key, uint8_t *datagram, uint32_t length) noexcept nogil:
        """Put a datagram into the newest run, or into a new one. borrowed: until flush()."""
        cdef Outbox *outbox = self.outbox
        cdef Run *run = &outbox.runs[outbox.run_count - 1]
        cdef iovec *piece = &outbox.pieces[outbox.piece_count - 1]
        if outbox.run_count and run_accepts(run, key, length, self.max_segments):
            run_extend(run, length)
            if <uint8_t *> piece.iov_base + piece.iov_len == datagram:
                piece.iov_len += length
                return
        else:
            run_begin(&outbox.runs[outbox.run_count], key, length)
            outbox.first_piece[outbox.run_count] = outbox.piece_count
            outbox.run_count += 1
        piece = &outbox.pieces[outbox.piece_count]
        piece.iov_base = datagram
        piece.iov_len = length
        outbox.piece_count += 1

    cdef void flush(self) noexcept nogil:
        """Send the runs in order, each datagram once, and empty the outbox."""
        cdef Outbox *outbox = self.outbox
        cdef int fds[BATCH]
        cdef int first = 0
        cdef int last, sent, i
        cdef Run *run
        for i in range(outbox.run_count):
            fds[i] = self._describe(i)
        while first < outbox.run_count:
            last = first + 1
            while last < outbox.run_count and fds[last] == fds[first]:
                last += 1
            sent = send_batch(fds[first], &outbox.batch, first, last - first)
            for i in range(first, first + sent):
                self._count(outbox.runs[i].key, outbox.runs[i].count, outbox.runs[i].bytes)
            if sent > 0:
                first += sent
                continue
            run = &outbox.runs[first]
            if (sent == -EIO or sent == -EINVAL) and run.count > 1:
                # Either UDP_SEGMENT is refused on this route, or (before Linux 6.14) the path's MTU
                # shrank. Only if datagrams of the run's size leave one by one was it the former.
                if self._send_singly(first, fds[first]):
                    self.max_segments = 1
            else:
                count_drop(self.counters, send_drop(sent), run.count)
            first += 1
        outbox.run_count = 0
        outbox.piece_count = 0
        outbox.segments_used = 0

    cdef int _describe(self, int i) noexcept nogil:
        """Fill message i for run i; the descriptor to send it from."""
        cdef Outbox *outbox = self.outbox
        cdef Run *run = &outbox.runs[i]
        cdef Peer *peer = &self.peers.slots[run.key >> KEY_SLOT]
        cdef Sockets *sockets = &self.v4 if peer.family == AF_INET else &self.v6
        cdef int first = outbox.first_piece[i]
        cdef int end = outbox.first_piece[i + 1] if i + 1 < outbox.run_count else outbox.piece_count
        send_describe(
            &outbox.batch,
            i,
            &peer.endpoint,
            peer.endpoint_length,
            &outbox.pieces[first],
            end - first,
            run.size if run.count > 1 else 0,
            run.key & ECN_MASK,
        )
        return sockets.fds[run.key >> KEY_SOCKET & 0xFF]

    cdef bint _send_singly(self, int i, int fd) noexcept nogil:
        """Send run i's datagrams each as a message of its own, in order; whether one of the run's size
        left, and not only a shorter last one."""
        cdef Outbox *outbox = self.outbox
        cdef Run *run = &outbox.runs[i]
        cdef Peer *peer = &self.peers.slots[run.key >> KEY_SLOT]
        cdef iovec *piece = &outbox.pieces[outbox.first_piece[i]]
        cdef iovec datagram
        cdef size_t at = 0
        cdef uint32_t left = run.bytes
        cdef bint any_left = False
        cdef int sent
        while left:
            datagram.iov_base = <uint8_t *> piece.iov_base + at
            datagram.iov_len = min(<uint32_t> run.size, left)
            send_describe(
                &outbox.batch, i, &peer.endpoint, peer.endpoint_length, &datagram, 1, 0, run.key & ECN_MASK
            )
            sent = send_batch(fd, &outbox.batch, i, 1)
            if sent > 0:
                any_left = any_left or datagram.iov_len == run.size
                self._count(run.key, 1, datagram.iov_len)
            else:
                count_drop(self.counters, send_drop(sent), 1)
            left -= datagram.iov_len
            at += datagram.iov_len
            if at == piece.iov_len:
                piece += 1
                at = 0
        return any_left

    cdef void _count(self, uint32_t key, uint32_t datagrams, uint64_t datagram_bytes) noexcept nogil:
        cdef Peer *peer = &self.peers.slots[key >> KEY_SLOT]
        cdef uint64_t inner_bytes = datagram_bytes - datagrams * (tunnel_bytes(key) + ETHERNET_HEADER)
        peer.encap_packets += datagrams
        peer.encap_bytes += inner_bytes
        self.counters.forwarded += datagrams
        self.counters.forwarded_bytes += inner_bytes


cdef OuterPath path_from(int fd, int version) except *:
    """The path's source half: the address and port the socket is bound to."""
    cdef OuterPath path
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(fileno=os.dup(fd)) as sock:
        name = sock.getsockname()
    address = socket.inet_pton(family, name[0])
    memset(&path, 0, sizeof(path))
    path.family = version
    path.source_port = name[1]
    memcpy(path.source, <const uint8_t *> address, len(address))
    return path


cdef inline void endpoint_to_path(const Peer *peer, OuterPath *path) noexcept nogil:
    cdef const sockaddr_in *v4 = <const sockaddr_in *> &peer.endpoint
    cdef const sockaddr_in6 *v6 = <const sockaddr_in6 *> &peer.endpoint
    if peer.family == AF_INET:
        memcpy(path.destination, &v4.sin_addr, 4)
        path.destination_port = load16(&v4.sin_port)
    else:
        memcpy(path.destination, &v6.sin6_addr, 16)
        path.destination_port = load16(&v6.sin6_port)


cdef inline int tunnel_bytes(uint32_t key) noexcept nogil:
    return PARTIAL_HEADER if key & KEY_PARTIAL else TUNNEL_HEADER


cdef inline void write_tunnel(const Peer *peer, bint partial, uint8_t *datagram) noexcept nogil:
    """Begin a datagram: the tunnel header and the inner destination MAC."""
    if partial:
        memcpy(datagram, peer.partial_header, sizeof(peer.partial_header))
    else:
        memcpy(datagram, peer.header, sizeof(peer.header))


cdef inline int send_drop(int failure) noexcept nogil:
    if failure == -EAGAIN or failure == -ENOBUFS:
        return DROP_UDP_FULL
    return DROP_TOO_BIG if failure == -EMSGSIZE else DROP_UDP_ERROR
