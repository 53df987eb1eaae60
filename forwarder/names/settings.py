"""What the daemon tells the resolver's process at its start. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_LINE_BYTES: Final = 1 << 26
"""The longest line between the two: what 100,000 records need."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Addresses, networks and servers are text. `addresses` are the resolver's own, `networks` those whose
    reverse names are ours, `clients` who may ask; an empty `upstream` stands for the host's servers.
    `expected` are sources without which nothing is said not to exist. `udp` and `tcp` are descriptors."""

    domain: str
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    clients: tuple[str, ...]
    upstream: tuple[str, ...]
    queries_per_second: int
    cache_bytes: int
    expected: tuple[str, ...] = ()
    udp: tuple[int, ...] = ()
    tcp: tuple[int, ...] = ()
