# Probes that were heard, on their way to the control plane. The pump puts them in while it moves packets;
# the loop takes them all when the pump's turn is over. A probe that finds the ring full is dropped: the
# next one of its peer tells as much.

from libc.stdint cimport uint8_t

from fastpath.wire.probe cimport PROBE_BYTES


cdef enum:
    HEARD_PROBES = 512


cdef struct Heard:
    int slot
    uint8_t probe[PROBE_BYTES]


cdef class Probes:
    cdef Heard *heard
    cdef int count

    cdef bint put(self, int slot, const uint8_t *probe) noexcept nogil
