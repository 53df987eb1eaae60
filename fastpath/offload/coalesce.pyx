"""Python face of coalescing, for tests and benches."""

from libc.stdlib cimport calloc, free

from fastpath.drops import DropReason

from fastpath.offload.virtio cimport VIRTIO_HEADER, virtio_encode
from fastpath.wire.classify cimport classify_frame


def merge(list frames not None, *, bint tcp=True, bint udp=True):
    """One batch of Ethernet frames -> [(virtio_net_hdr, frame)], as they would be written to a TAP."""
    cdef Coalescer *all = <Coalescer *> calloc(1, sizeof(Coalescer))
    cdef Frame info
    cdef bytearray copy
    cdef list kept = []
    cdef list out = []
    cdef int i, drop
    if all == NULL:
        raise MemoryError
    try:
        all.tcp = tcp
        all.udp = udp
        for i in range(BUCKETS):
            all.newest[i] = NO_CHAIN
        for frame in frames:
            copy = bytearray(frame)
            kept.append(copy)  # a chain borrows it
            drop = classify_frame(copy, len(copy), &info)
            if drop:
                raise ValueError(f"frame: {DropReason(drop).name}")
            if not coalesce_add(all, &info, 1, False):
                out += finish(all)
                coalesce_add(all, &info, 1, False)
        out += finish(all)
    finally:
        free(all)
    return out


cdef list finish(Coalescer *all):
    cdef list out = []
    cdef VnetHeader offload
    cdef uint8_t header[VIRTIO_HEADER]
    cdef Chain *chain
    cdef bytes frame
    cdef int i, k
    for i in range(all.count):
        chain = &all.chains[i]
        offload = chain_finish(chain) if chain.packets > 1 else packet_offload(&chain.first, chain.partial)
        virtio_encode(header, &offload)
        frame = (chain.first.packet - ETHERNET_HEADER)[:ETHERNET_HEADER]
        for k in range(1, chain.packets + 1):
            frame += (<uint8_t *> chain.pieces[k].iov_base)[: chain.pieces[k].iov_len]
        out.append((header[:VIRTIO_HEADER], frame))
    coalesce_reset(all)
    return out
