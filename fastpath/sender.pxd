# Datagrams on their way out. encap posts them in order; flush() sends them as runs, each datagram
# exactly once, and counts what became of it.
#
# Words, smallest to largest: a datagram is a frame that leaves from where it was read, its tunnel header
# written before it, or a segment, which is written whole to the outbox; a piece is an iovec, of datagrams
# that lie one behind the other; a run is datagrams one UDP_SEGMENT send can carry; the outbox holds the
# runs of one flush.
#
# Where there is an uplink, a TCP superframe goes to it whole and at once, behind what was posted before.
#
# borrowed: every piece, until flush().

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastpath.drops cimport Counters
from fastpath.kernel.udp cimport BATCH, SendBatch
from fastpath.linux cimport iovec, ssize_t
from fastpath.offload.plan cimport Run
from fastpath.offload.segment cimport Superframe
from fastpath.offload.tunnel cimport OuterPath
from fastpath.table cimport Peer, PeerTable


cdef enum:
    TUNNEL_HEADER = 8                   # Geneve without options, or VXLAN
    PARTIAL_HEADER = 12                 # Geneve with the partial-checksum option
    PIECES = 1024                       # UIO_MAXIOV, though no run comes near it
    SEGMENTS_BYTES = 128 * 1024         # more than the longest datagram
    UPLINK_REFUSALS = 16                # in a row, until the uplink is given up
    SOCKETS = 16                        # of each family
    ENCAPSULATIONS = 2


cdef struct Outbox:
    iovec pieces[PIECES]
    Run runs[BATCH]
    uint16_t first_piece[BATCH]
    int piece_count
    int run_count
    uint32_t segments_used
    SendBatch batch
    uint8_t segments[SEGMENTS_BYTES]


# Behind the first `count` sockets, that flows are spread over, are the homes: see Peer.from_home.
cdef struct Sockets:
    int fds[SOCKETS + ENCAPSULATIONS]
    OuterPath paths[SOCKETS + ENCAPSULATIONS]  # from each socket's own address and port, to nowhere yet
    bint has_home[ENCAPSULATIONS]
    uint32_t count


cdef class Sender:
    cdef PeerTable peers
    cdef Counters *counters             # borrowed: the pump's
    cdef Sockets v4
    cdef Sockets v6
    cdef Outbox *outbox
    cdef int max_segments               # 1 when UDP_SEGMENT is off
    cdef int uplink_fd                  # a TAP that takes tunnel GSO, -1 if there is none
    cdef bint uplink                    # whether it is used
    cdef int uplink_refusals            # in a row
    cdef uint8_t uplink_mac[6]

    cdef uint32_t socket_index(self, const Peer *peer, uint32_t flow) noexcept nogil
    cdef uint32_t key(self, int slot, uint32_t flow, int ecn) noexcept nogil
    cdef int post_frame(
        self, int slot, uint32_t flow, int ecn, uint8_t *frame, size_t length, bint partial
    ) noexcept nogil
    cdef int post_superframe(
        self, int slot, uint32_t flow, int ecn, const Superframe *cut, bint partial
    ) noexcept nogil
    cdef int send_probe(
        self, int slot, uint32_t flow, uint8_t *frame, size_t length
    ) noexcept nogil
    cdef ssize_t _write_uplink(self, uint32_t key, int ecn, const Superframe *cut) noexcept nogil
    cdef void flush(self) noexcept nogil
    cdef void _make_room(self, uint32_t key, uint32_t length, uint32_t written) noexcept nogil
    cdef void _join(self, uint32_t key, uint8_t *datagram, uint32_t length) noexcept nogil
    cdef int _describe(self, int run) noexcept nogil
    cdef bint _send_singly(self, int run, int fd) noexcept nogil
    cdef void _count(self, uint32_t key, uint32_t datagrams, uint64_t datagram_bytes) noexcept nogil
