"""Python face of the Internet checksum, for tests and benches."""

from fastpath.wire.byteorder cimport load16, store16


def checksum(const uint8_t[::1] data not None, unsigned long initial=0):
    """The Internet checksum (RFC 1071) of the bytes, complemented, as the big-endian value."""
    cdef uint8_t field[2]
    cdef uint16_t raw
    store16(field, sum_fold(initial))
    memcpy(&raw, field, 2)
    sum_store(field, sum_add(&data[0] if data.shape[0] else NULL, data.shape[0], raw))
    return load16(field)


def update16(uint16_t checksum, uint16_t old, uint16_t new):
    """RFC 1624: the checksum after one 16-bit word changed from `old` to `new`."""
    cdef uint8_t field[2]
    cdef uint16_t old_raw, new_raw
    store16(field, old)
    memcpy(&old_raw, field, 2)
    store16(field, new)
    memcpy(&new_raw, field, 2)
    store16(field, checksum)
    checksum_update16(field, old_raw, new_raw)
    return load16(field)
