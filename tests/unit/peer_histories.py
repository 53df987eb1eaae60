"""Peers that come, go and pass their addresses on, for property tests."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from hypothesis import strategies as st

from forwarder.peers import PeerRecord

ENDPOINTS = [IPv4Address(0xC0000200 + index) for index in range(8)]
PREFIXES = [IPv4Network((0x0A2A0000 + (index << 8), 24)) for index in range(8)]


@st.composite
def snapshots(draw: st.DrawFn) -> list[PeerRecord]:
    """Up to six of eight nodes, who share out ENDPOINTS and PREFIXES as they like."""
    numbers = draw(st.lists(st.integers(0, 7), unique=True, max_size=6))
    endpoints = draw(st.permutations(ENDPOINTS))
    owners = draw(st.lists(st.sampled_from([*numbers, None]), min_size=8, max_size=8))
    details = draw(st.lists(st.integers(0, 2), min_size=8, max_size=8))
    return [
        PeerRecord(
            id=f"n{number}",
            endpoints=(endpoint,),
            port=6081 + detail,
            encapsulation=("geneve", "vxlan")[detail % 2],
            vni=detail,
            router_mac=bytes([2, 0, 0, 0, detail, number]),
            prefixes=tuple(prefix for prefix, owner in zip(PREFIXES, owners, strict=True) if owner == number),
        )
        for number, endpoint, detail in zip(numbers, endpoints, details, strict=False)
    ]
