# Datagrams -> runs: what one UDP_SEGMENT send can carry. Knows sizes and keys, no cmsg, no fd.
#
# A run is datagrams of one size to one place, sent in one call and cut apart by the kernel or the
# NIC. Its last datagram may be shorter, and closes it. Order is kept: a datagram joins the newest
# run or begins one.

from libc.stdint cimport uint16_t, uint32_t


cdef enum:
    RUN_MAX_SEGMENTS = 64   # UDP_MAX_SEGMENTS of linux/udp.h before 6.9; later kernels take 128
    RUN_MAX_BYTES = 65507   # the largest UDP payload over IPv4; one limit serves both families


cdef struct Run:
    uint32_t key      # equal keys may share a run: same peer, socket and ToS
    uint32_t bytes
    uint16_t size     # of each datagram but the last
    uint16_t count
    bint closed       # a shorter datagram ended it


cdef inline bint run_accepts(
    const Run *run, uint32_t key, uint32_t length, int max_segments
) noexcept nogil:
    return (
        not run.closed
        and run.key == key
        and length <= run.size
        and run.count < max_segments
        and run.bytes + length <= RUN_MAX_BYTES
    )


cdef inline void run_begin(Run *run, uint32_t key, uint32_t length) noexcept nogil:
    run.key = key
    run.bytes = length
    run.size = <uint16_t> length
    run.count = 1
    run.closed = False


cdef inline void run_extend(Run *run, uint32_t length) noexcept nogil:
    run.bytes += length
    run.count += 1
    run.closed = length < run.size
