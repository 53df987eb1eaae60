# Probes: frames from node to node about the path between them, which no pod ever sees. An Ethernet header
# (destination the peer's router MAC, source the sender's), a tag, a kind and its fields, then padding.
#
# The EtherType is the first of the two that IEEE Std 802 leaves to experiments; the subtype and version
# that it asks for there are the tag. Kernels and switches that get such a frame know nobody who wants it.
# In Geneve the header says besides that this is a control packet (RFC 8926 section 3.4, the O bit); VXLAN
# has no word for that. What the fields mean is forwarder.probe's.

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from fastpath.wire.byteorder cimport load16, load32, store16
from fastpath.wire.ethernet cimport ETHERNET_HEADER, ETHERNET_TYPE


cdef enum:
    ETHERTYPE_PROBE = 0x88B5
    PROBE_TAG = 0x706C01          # "pl", version 1; the byte behind it is the kind
    PROBE_KIND = 3                # where the kind is, behind the Ethernet header
    PROBE_ROAMING = 0x10          # kinds from here on are authentic by themselves: see forwarder.roaming
    PROBE_BYTES = 64              # tag, kind and fields: every kind is of this length, without padding


cdef inline bint is_probe(const uint8_t *frame, size_t length) noexcept nogil:
    """Whether a frame with a whole Ethernet header is a whole probe of a version we know."""
    return (
        length >= ETHERNET_HEADER + PROBE_BYTES
        and load16(frame + ETHERNET_TYPE) == ETHERTYPE_PROBE
        and load32(frame + ETHERNET_HEADER) >> 8 == PROBE_TAG
    )


cdef inline bint is_roaming(const uint8_t *frame) noexcept nogil:
    """Whether a probe may come from an address that is nobody's yet."""
    return frame[ETHERNET_HEADER + PROBE_KIND] >= PROBE_ROAMING


cdef inline void probe_encode(
    uint8_t *frame, const uint8_t *source, const uint8_t *probe, size_t padding
) noexcept nogil:
    """The frame but for its destination: `probe` is PROBE_BYTES, and as many zeroes as `padding` follow."""
    memcpy(frame + 6, source, 6)
    store16(frame + ETHERNET_TYPE, ETHERTYPE_PROBE)
    memcpy(frame + ETHERNET_HEADER, probe, PROBE_BYTES)
    memset(frame + ETHERNET_HEADER + PROBE_BYTES, 0, padding)
