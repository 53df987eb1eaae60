"""Heard probes, between the pump and the loop."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy


cdef class Probes:
    """Room for HEARD_PROBES of them, allocated once."""

    def __cinit__(self):
        self.heard = <Heard *> calloc(HEARD_PROBES, sizeof(Heard))
        if self.heard == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.heard)

    cdef bint put(self, int slot, const uint8_t *probe) noexcept nogil:
        """Keep a probe's PROBE_BYTES; whether there was room."""
        cdef Heard *heard
        if self.count == HEARD_PROBES:
            return False
        heard = &self.heard[self.count]
        heard.slot = slot
        memcpy(heard.probe, probe, PROBE_BYTES)
        self.count += 1
        return True

    def take(self):
        """[(slot, probe without padding)] in the order of arrival; then none is left."""
        cdef Heard *heard
        cdef list taken = []
        cdef int i
        for i in range(self.count):
            heard = &self.heard[i]
            taken.append((heard.slot, heard.probe[:PROBE_BYTES]))
        self.count = 0
        return taken
