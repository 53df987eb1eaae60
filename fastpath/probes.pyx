"""Heard probes, between the pump and the loop."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy


cdef class Probes:
    """Room for HEARD_PROBES and ROAMING_PROBES of them, allocated once."""

    def __cinit__(self):
        self.heard = <Heard *> calloc(HEARD_PROBES, sizeof(Heard))
        self.roaming = <Roaming *> calloc(ROAMING_PROBES, sizeof(Roaming))
        if self.heard == NULL or self.roaming == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.roaming)
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

    cdef Roaming *next_roaming(self) noexcept nogil:
        """Room for another roaming probe, to be filled; NULL if there is none."""
        if self.roaming_count == ROAMING_PROBES:
            return NULL
        self.roaming_count += 1
        return &self.roaming[self.roaming_count - 1]

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

    def take_roaming(self):
        """[(slot or -1, encapsulation, address, port, probe)] in the order of arrival; then none is left."""
        cdef Roaming *heard
        cdef list taken = []
        cdef int i
        for i in range(self.roaming_count):
            heard = &self.roaming[i]
            address = heard.address[:heard.address_bytes]
            probe = heard.probe[:PROBE_BYTES]
            taken.append((heard.slot, heard.encapsulation, address, heard.port, probe))
        self.roaming_count = 0
        return taken
