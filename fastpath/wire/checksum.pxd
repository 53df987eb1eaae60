# The Internet checksum (RFC 1071). Sums are kept in the host's own byte order, as section 2(B)
# allows: `raw` below means a 16-bit word as it lies in memory. Nothing here knows a protocol.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef extern from "checksum_sum.h" nogil:
    # Add the bytes to a partial sum. `data` must start on an even byte of the summed whole.
    uint64_t sum_add "podloom_sum"(const uint8_t *data, size_t length, uint64_t total) noexcept

    # The same, and copy them: they are loaded once for both.
    uint64_t sum_copy "podloom_sum_copy"(
        uint8_t *to, const uint8_t *data, size_t length, uint64_t total
    ) noexcept


cdef inline uint16_t sum_fold(uint64_t total) noexcept nogil:
    total = <uint64_t> <uint32_t> total + (total >> 32)
    total = <uint64_t> <uint32_t> total + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return <uint16_t> total


cdef inline void sum_store(uint8_t *field, uint64_t total) noexcept nogil:
    """Write the complement of the folded sum into the two bytes of a checksum field."""
    cdef uint16_t raw = <uint16_t> ~sum_fold(total)
    memcpy(field, &raw, 2)


cdef inline void checksum_update16(uint8_t *field, uint16_t old_raw, uint16_t new_raw) noexcept nogil:
    """RFC 1624 equation 3: the field after one raw word changed."""
    cdef uint16_t check
    memcpy(&check, field, 2)
    check = <uint16_t> ~sum_fold(<uint64_t> <uint16_t> ~check + <uint16_t> ~old_raw + new_raw)
    memcpy(field, &check, 2)
