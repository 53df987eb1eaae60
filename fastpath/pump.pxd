# The two journeys of a packet, each a screen long: what a stage does lives with the stage.
#
# Buffers. encap reads frames into one arena, each behind headroom for its tunnel header, and they
# leave from there; a superframe's segments leave from the sender's outbox. decap writes packets to the
# TAP from where their datagrams were received. Nothing is allocated after __init__.

from libc.stdint cimport uint8_t, uint32_t

from fastpath.drops cimport Counters
from fastpath.kernel.udp cimport BATCH, Received, ReceiveBatch
from fastpath.linux cimport epoll_event
from fastpath.probes cimport Probes
from fastpath.sender cimport Sender
from fastpath.spin cimport Spin
from fastpath.table cimport Encapsulation, PeerTable, PrefixTable
from fastpath.writer cimport Writer


cdef enum:
    HEADROOM = 128                # TUNNEL_HEADERS, rounded up
    FRAME_BYTES = 65536 + 64      # the longest frame with its virtio header
    ARENA_BYTES = 256 * 1024
    ENCAP_BUDGET = 256            # frames in one call of encap()
    RECEIVERS = 8
    LONG_MESSAGE = 16 * 1024      # a message longer than this is a train or a superframe
    LONG_BATCH = 8                # messages of that kind in one receive: what the cache holds
    TURN_ROUNDS = 64              # waits in one call of turn()


cdef struct Receiver:
    int fd
    Encapsulation encapsulation
    int budget                    # messages in the next receive


cdef class Pump:
    cdef int poll_fd
    cdef int tap_fd
    cdef int vnet_size
    cdef uint32_t vni
    cdef uint32_t mtu
    cdef bint vxlan_strict
    cdef uint8_t router_mac[6]
    cdef PrefixTable prefixes
    cdef PeerTable peers
    cdef Sender sender
    cdef Writer writer
    cdef Probes probes
    cdef bint roaming             # whether probes of that kind are heard, from whomever
    cdef const Received *message  # borrowed: what is decapsulated now
    cdef Encapsulation encapsulation  # of it
    cdef Receiver receivers[RECEIVERS]
    cdef int receiver_count
    cdef Counters encap_counters
    cdef Counters decap_counters
    cdef uint8_t *arena
    cdef ReceiveBatch *inbox
    cdef Spin spin

    cdef int run_turn(self, long idle_microseconds) noexcept nogil
    cdef int await_events(self, epoll_event *events, long idle_microseconds) noexcept nogil
    cdef int look_once(self) noexcept nogil
    cdef int run_encap(self, int budget) noexcept nogil
    cdef int encap_frame(self, uint8_t *buffer, size_t length, uint32_t *packets) noexcept nogil
    cdef int run_decap(self, Receiver *receiver, int budget) noexcept nogil
    cdef void decap_message(self, Receiver *receiver, Received *message) noexcept nogil
    cdef int decap_datagram(
        self, Receiver *receiver, int slot, uint8_t *datagram, size_t length, int outer_ecn
    ) noexcept nogil
    cdef int decap_control(self, int slot, const uint8_t *datagram, size_t length) noexcept nogil
    cdef bint hear_stranger(self) noexcept nogil
    cdef int hear(self, int slot, const uint8_t *frame) noexcept nogil
    cdef bint keep_roaming(self, int slot, const uint8_t *probe) noexcept nogil
