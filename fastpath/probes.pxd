# Probes that were heard, on their way to the control plane. The pump puts them in while it moves packets;
# the loop takes them all when the pump's turn is over. A probe that finds the ring full is dropped: the
# next one of its peer tells as much. Roaming probes have a ring of their own, since anybody may fill it.

from libc.stdint cimport uint8_t, uint16_t

from fastpath.wire.probe cimport PROBE_BYTES


cdef enum:
    HEARD_PROBES = 512
    ROAMING_PROBES = 64


cdef struct Heard:
    int slot
    uint8_t probe[PROBE_BYTES]


cdef struct Roaming:
    int slot                      # NO_SLOT: the address is nobody's
    uint8_t encapsulation         # in which it came
    uint8_t address_bytes         # 4 or 16
    uint8_t address[16]
    uint16_t port
    uint8_t probe[PROBE_BYTES]


cdef class Probes:
    cdef Heard *heard
    cdef int count
    cdef Roaming *roaming
    cdef int roaming_count

    cdef bint put(self, int slot, const uint8_t *probe) noexcept nogil
    cdef Roaming *next_roaming(self) noexcept nogil
