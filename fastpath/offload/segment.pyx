"""Python face of cutting superframes, for tests and benches."""

from fastpath.drops import DropReason

from fastpath.offload.virtio cimport VIRTIO_HEADER, virtio_decode
from fastpath.wire.classify cimport classify_frame


def cut(bytes header not None, bytes frame not None):
    """The frames that the superframe behind this virtio_net_hdr stands for, or the drop reason."""
    cdef VnetHeader offload
    cdef Frame info
    cdef Superframe whole
    cdef uint8_t block[SEGMENT_HEADERS]
    cdef uint8_t *data = <uint8_t *> <const uint8_t *> frame
    cdef uint32_t i, at
    cdef int drop
    if len(header) < VIRTIO_HEADER:
        raise ValueError(f"header: {len(header)} bytes, {VIRTIO_HEADER} needed")
    offload = virtio_decode(header)
    drop = classify_frame(data, len(frame), &info)
    if not drop:
        drop = segment_open(&offload, data, &info, &whole)
    if drop:
        return DropReason(drop)
    frames = []
    for i in range(whole.count):
        segment_header(&whole, i, block, False)
        at = whole.headers + i * whole.size
        frames.append(block[:whole.headers] + frame[at : at + segment_payload(&whole, i)])
    return frames
