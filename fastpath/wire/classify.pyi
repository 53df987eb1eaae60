from typing import NamedTuple

from fastpath.drops import DropReason

class FrameInfo(NamedTuple):
    family: int
    """4 or 6: the inner IP version."""
    packet_length: int
    """Bytes of the IP packet as its own header says; Ethernet padding behind it is not counted."""
    header_length: int
    """Bytes of the IPv4 header with options; 40 for IPv6."""
    protocol: int
    """IPv4 protocol or IPv6 next header (of the fixed header: extension headers are not walked)."""
    tos: int
    """The ToS or Traffic Class byte: DSCP and ECN."""
    is_fragment: bool
    """An IPv4 fragment, or an IPv6 packet whose first extension is a fragment header."""
    flow_hash: int
    """32 bits; equal for equal (addresses, protocol, ports), ports left out for fragments."""

def classify(frame: bytes) -> FrameInfo | DropReason:
    """An untagged Ethernet frame that carries IPv4 or IPv6, or why it is not one:
    FRAME_SHORT, FRAME_VLAN, FRAME_NOT_IP, IP_MALFORMED, IP_TTL_EXPIRED (TTL or hop limit 0)."""

def ecn_decapsulate(inner: int, outer: int) -> int | None:
    """RFC 6040 section 4.2: the ECN field (0-3) to forward, or None to drop."""
