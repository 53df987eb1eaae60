# Packets on their way into the TAP. decap puts them in order; flush() writes them as frames from the
# virtual router to the gateway, superframes where the rules of offload/coalesce allow, each packet
# exactly once, and counts what became of it.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastpath.drops cimport Counters
from fastpath.linux cimport ssize_t
from fastpath.offload.coalesce cimport Chain, Coalescer
from fastpath.offload.virtio cimport VnetHeader
from fastpath.table cimport PeerTable
from fastpath.wire.classify cimport Frame


cdef class Writer:
    cdef int fd
    cdef int vnet_size
    cdef PeerTable peers
    cdef Counters *counters      # borrowed: the pump's
    cdef uint8_t header[40]      # virtio header, gateway MAC, router MAC, EtherType
    cdef Coalescer *chains

    cdef void put(self, const Frame *info, uint16_t slot, bint said_partial) noexcept nogil
    cdef int put_superframe(self, const Frame *info, uint16_t slot, uint32_t mtu) noexcept nogil
    cdef void flush(self) noexcept nogil
    cdef void _write_chain(self, Chain *chain) noexcept nogil
    cdef bint _write_singly(self, Chain *chain) noexcept nogil
    cdef ssize_t _write(self, Chain *chain, int pieces, const VnetHeader *offload) noexcept nogil
    cdef void _count(
        self, const Chain *chain, int packets, uint64_t packet_bytes, ssize_t written
    ) noexcept nogil
