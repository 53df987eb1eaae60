"""Python face of the virtio header, for tests and benches."""

import collections

from fastpath.drops import DropReason

VirtioHeader = collections.namedtuple(
    "VirtioHeader",
    ["flags", "gso_type", "header_length", "gso_size", "checksum_start", "checksum_offset"],
)


cdef VnetHeader from_tuple(fields) except *:
    cdef VnetHeader header
    (
        header.flags,
        header.gso_type,
        header.header_length,
        header.gso_size,
        header.checksum_start,
        header.checksum_offset,
    ) = fields
    return header


def decode(bytes header not None):
    if len(header) < VIRTIO_HEADER:
        raise ValueError(f"header: {len(header)} bytes, {VIRTIO_HEADER} needed")
    cdef VnetHeader h = virtio_decode(header)
    return VirtioHeader(
        h.flags, h.gso_type, h.header_length, h.gso_size, h.checksum_start, h.checksum_offset
    )


def encode(header):
    cdef uint8_t data[VIRTIO_HEADER]
    cdef VnetHeader h = from_tuple(header)
    virtio_encode(data, &h)
    return data[:VIRTIO_HEADER]


def complete_checksum(header, bytes frame not None):
    """The frame with its partial checksum finished, or VIRTIO_HEADER if the two do not fit."""
    cdef VnetHeader h = from_tuple(header)
    cdef bytearray copy = bytearray(frame)
    cdef int drop = virtio_complete_checksum(&h, copy, len(copy))
    return DropReason(drop) if drop else bytes(copy)
