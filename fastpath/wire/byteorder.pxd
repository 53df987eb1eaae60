# Big-endian loads and stores at any alignment, and nothing else. The only place that knows the
# host's byte order.

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint16_t htobe16(uint16_t value)
    uint32_t htobe32(uint32_t value)


cdef inline uint16_t load16(const void *p) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, p, 2)
    return be16toh(value)


cdef inline uint32_t load32(const void *p) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, p, 4)
    return be32toh(value)


cdef inline uint64_t load64(const void *p) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, p, 8)
    return be64toh(value)


cdef inline void store16(void *p, uint16_t value) noexcept nogil:
    cdef uint16_t wire = htobe16(value)
    memcpy(p, &wire, 2)


cdef inline void store32(void *p, uint32_t value) noexcept nogil:
    cdef uint32_t wire = htobe32(value)
    memcpy(p, &wire, 4)


cdef inline uint16_t raw16(uint16_t value) noexcept nogil:
    """The value as it lies in a packet: what the Internet checksum sums."""
    return htobe16(value)
