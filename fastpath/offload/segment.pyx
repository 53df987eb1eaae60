"""Python face of cutting superframes, for tests and benches."""

from fastpath.drops import DropReason

from fastpath.offload.virtio cimport VIRTIO_HEADER, virtio_decode
from fastpath.wire.classify cimport classify_frame


def cut(bytes header not None, bytes frame not None):
    """The frames that the superframe behind this virtio_net_hdr stands for, or the drop reason."""
    cdef VnetHeader offload
    cdef Frame info
    cdef Superframe whole
    cdef uint8_t segment[SEGMENT_HEADERS + 65535]
    cdef uint8_t *data = <uint8_t *> <const uint8_t *> frame
    cdef uint32_t i
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
        segment_write(&whole, i, segment, False)
        frames.append(segment[: segment_bytes(&whole, i)])
    return frames
