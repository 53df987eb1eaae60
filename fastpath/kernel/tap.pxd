# Reads and writes of one TAP frame, each behind its virtio_net_hdr. A TAP has no recvmmsg:
# one call moves one frame, which a superframe makes worth while.

from fastpath.linux cimport errno, iovec, read, ssize_t, writev


cdef inline ssize_t tap_read(int fd, void *buffer, size_t size) noexcept nogil:
    """Bytes of header and frame, or -errno."""
    cdef ssize_t n = read(fd, buffer, size)
    return n if n >= 0 else -errno


cdef inline ssize_t tap_write(int fd, const iovec *pieces, int count) noexcept nogil:
    """Bytes written, or -errno. The kernel takes a frame whole or not at all."""
    cdef ssize_t n = writev(fd, pieces, count)
    return n if n >= 0 else -errno
