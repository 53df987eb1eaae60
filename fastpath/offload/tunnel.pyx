"""Python face of the tunnel superframe, for the uplink's self-test and for tests."""

from fastpath.drops import DropReason

from fastpath.offload.segment cimport segment_open
from fastpath.offload.virtio cimport VIRTIO_HEADER, virtio_decode
from fastpath.wire.classify cimport Frame, classify_frame


def wrap(
    bytes header not None,
    bytes frame not None,
    *,
    bytes tunnel not None,
    bytes source not None,
    int source_port,
    bytes destination not None,
    int destination_port,
    bytes uplink_mac not None,
    int ecn=0,
):
    """What is written to an uplink for the TCP superframe behind this virtio_net_hdr, or the drop reason."""
    cdef VnetHeader offload
    cdef Frame info
    cdef Superframe cut
    cdef OuterPath path
    cdef int drop, before
    cdef bytearray room = bytearray(TUNNEL_HEADERS) + frame
    cdef uint8_t *data = room
    if len(header) < VIRTIO_HEADER or len(tunnel) != 8 or len(uplink_mac) != 6:
        raise ValueError(f"header, tunnel, uplink_mac: {VIRTIO_HEADER}, 8 and 6 bytes needed")
    if len(source) not in (4, 16) or len(destination) != len(source):
        raise ValueError("source, destination: both 4 or both 16 bytes")
    offload = virtio_decode(header)
    drop = classify_frame(data + TUNNEL_HEADERS, len(frame), &info)
    if not drop:
        drop = segment_open(&offload, data + TUNNEL_HEADERS, &info, &cut)
    if drop:
        return DropReason(drop)
    memset(&path, 0, sizeof(path))
    path.family = 4 if len(source) == 4 else 6
    path.source_port = source_port
    path.destination_port = destination_port
    memcpy(path.source, <const uint8_t *> source, len(source))
    memcpy(path.destination, <const uint8_t *> destination, len(destination))
    before = tunnel_headers(&cut, tunnel, &path, uplink_mac, ecn)
    return bytes(room[TUNNEL_HEADERS - before :])
