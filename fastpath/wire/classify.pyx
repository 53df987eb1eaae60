"""Python face of frame classification, for tests and benches."""

import collections

from fastpath.drops import DropReason

from fastpath.wire.ip cimport ecn_combine

FrameInfo = collections.namedtuple(
    "FrameInfo",
    ["family", "packet_length", "header_length", "protocol", "tos", "is_fragment", "flow_hash"],
)


def classify(bytes frame not None):
    """An untagged Ethernet frame that carries IPv4 or IPv6, or why it is not one."""
    cdef Frame info
    # Only the pump's later steps write through info.packet; classifying reads.
    cdef int drop = classify_frame(<uint8_t *> <const uint8_t *> frame, len(frame), &info)
    if drop:
        return DropReason(drop)
    return FrameInfo(
        info.family,
        info.packet_length,
        info.header_length,
        info.protocol,
        info.tos,
        bool(info.is_fragment),
        flow_hash(&info),
    )


def ecn_decapsulate(int inner, int outer):
    """RFC 6040 section 4.2: the ECN field (0-3) to forward, or None to drop."""
    cdef int ecn = ecn_combine(inner, outer)
    return None if ecn < 0 else ecn
