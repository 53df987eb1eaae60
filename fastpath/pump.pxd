# The two journeys of a packet. Everything here is policy-free plumbing between the stages; what a
# stage does lives with the stage.
#
# Buffers. encap reads frames into one arena, each behind headroom in which its tunnel header is
# written, so a datagram leaves from where its frame was read. decap writes a packet to the TAP from
# where its datagram was received, with a new Ethernet header gathered before it. Nothing is copied
# and nothing allocated after __init__.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastpath.drops cimport Counters
from fastpath.kernel.udp cimport BATCH, Received, ReceiveBatch, SendBatch
from fastpath.linux cimport iovec
from fastpath.offload.plan cimport Run
from fastpath.table cimport Encapsulation, PeerTable, PrefixTable


cdef enum:
    HEADROOM = 64
    FRAME_BYTES = 65536 + 64      # the longest frame with its virtio header
    ARENA_BYTES = 256 * 1024
    OUTBOX_PIECES = 1024
    RECEIVERS = 8
    SENDERS = 16                  # of each family


# Datagrams on their way out: their pieces, and the runs that those make up, in order.
cdef struct Outbox:
    iovec pieces[OUTBOX_PIECES]
    Run runs[BATCH]
    uint16_t first_piece[BATCH]
    int piece_count
    int run_count
    SendBatch batch


cdef struct Receiver:
    int fd
    Encapsulation encapsulation


cdef struct Senders:
    int fds[SENDERS]
    uint32_t count


cdef class Pump:
    cdef int tap_fd
    cdef int vnet_size
    cdef uint32_t vni
    cdef bint vxlan_strict
    cdef int max_segments
    cdef uint8_t router_mac[6]
    cdef uint8_t delivery_header[40]   # virtio header, then gateway MAC, router MAC, EtherType
    cdef PrefixTable prefixes
    cdef PeerTable peers
    cdef Receiver receivers[RECEIVERS]
    cdef int receiver_count
    cdef Senders senders4
    cdef Senders senders6
    cdef Counters encap_counters
    cdef Counters decap_counters
    cdef uint8_t *arena
    cdef Outbox *outbox
    cdef ReceiveBatch *inbox

    cdef int run_encap(self, int budget) noexcept nogil
    cdef int encap_frame(self, uint8_t *buffer, size_t length) noexcept nogil
    cdef int post(self, int slot, uint32_t flow, int ecn, uint8_t *datagram, size_t length) noexcept nogil
    cdef void flush(self) noexcept nogil
    cdef int run_decap(self, Receiver *receiver, int budget) noexcept nogil
    cdef void decap_message(self, Receiver *receiver, Received *message) noexcept nogil
    cdef int decap_datagram(
        self, Receiver *receiver, int slot, uint8_t *datagram, size_t length, int outer_ecn
    ) noexcept nogil
    cdef int deliver(self, uint8_t *packet, size_t length, int family) noexcept nogil
