"""The addresses podloom speaks of: IP addresses and prefixes, MACs, and those derived from them. Pure."""

from __future__ import annotations

import hashlib
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

VIRTUAL_ROUTER: Final[dict[int, Address]] = {
    4: IPv4Address("169.254.71.1"),
    6: IPv6Address("fe80::706f:646c"),
}
"""By IP version, the next hop of the cluster route: link-local and never on the wire."""


def parse_mac(text: str) -> bytes:
    """Six bytes of a unicast "02:00:00:00:00:01". ValueError if it is not one."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise ValueError("not six colon-separated bytes")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise ValueError("a group address")
    if not any(mac):
        raise ValueError("all zero")
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


def derive_mac(node_id: str, role: str) -> bytes:
    """A locally administered unicast MAC that is always the same for one (node id, role)."""
    digest = hashlib.sha256(f"podloom {role} {node_id}".encode()).digest()
    return bytes([(digest[0] & 0xFC) | 0x02]) + digest[1:6]


def gateway_of(prefix: Network) -> Address:
    """The prefix's first host address, which loom0 has."""
    return prefix.network_address + 1
