# The two tables of the fast path, and the peers they lead to.
#
# PrefixTable answers "whose is this inner address?" by longest-prefix match. It keeps one open-
# addressed hash per prefix length, longest first: pod prefixes of a cluster have one or two
# lengths, so a lookup is one or two probes however many nodes there are.
#
# PeerTable holds a slot per peer: the headers its datagrams begin with, ready to copy, and its
# socket address. Its `sources` lead from an outer address to the slot that may send from it.
#
# Both are changed by the loop that runs the pump, between batches: no locks.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastpath.linux cimport sockaddr_storage, socklen_t


cdef enum:
    NO_SLOT = -1
    LOCAL = 0
    PEER_LIMIT = 65536


cdef enum Encapsulation:
    GENEVE = 0
    VXLAN = 1


# 128 bits that an address fills from the top; an IPv4 address has 96 zero bits below it.
cdef struct Address:
    uint64_t high
    uint64_t low


cdef struct Entry:
    Address prefix
    int32_t slot  # NO_SLOT: this place is free


cdef struct Level:
    Entry *entries
    Address mask
    uint32_t capacity  # a power of two, at least twice `count`
    uint32_t count
    int length


cdef struct Family:
    Level levels[129]  # longest first
    int count


cdef struct Peer:
    uint8_t header[14]          # how its datagrams begin: tunnel header (8), inner destination MAC (6)
    uint8_t partial_header[18]  # the same for a packet whose checksum is partial, with the option (4)
    uint8_t encapsulation
    bint partial_checksums      # whether such packets may be sent to it, and it may send them
    bint from_home              # whether all its datagrams leave from the port we receive on
    bint used
    uint32_t mtu              # largest inner IP packet, bytes
    int family
    socklen_t endpoint_length
    sockaddr_storage endpoint
    uint64_t encap_packets
    uint64_t encap_bytes
    uint64_t decap_packets
    uint64_t decap_bytes


cdef class PrefixTable:
    cdef Family v4
    cdef Family v6

    cdef int32_t find4(self, const uint8_t *address) noexcept nogil
    cdef int32_t find6(self, const uint8_t *address) noexcept nogil


cdef class PeerTable:
    cdef Peer *slots
    cdef uint32_t capacity
    cdef readonly PrefixTable sources


cdef inline Peer *peer_at(PeerTable table, int32_t slot) noexcept nogil:
    """The peer in a slot that the prefix table gave, NULL if none is there (yet, or any more)."""
    if slot == NO_SLOT or <uint32_t> slot >= table.capacity or not table.slots[slot].used:
        return NULL
    return &table.slots[slot]
