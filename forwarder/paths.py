"""Paths that carry less than the device they leave by: asking the kernel, and what follows from the answer.

Our datagrams are never fragmented, so the kernel learns from ICMP what a path carries, and keeps it for some
minutes (RFC 1191, RFC 8201). A peer behind such a path gets its MTU in the fast path, and its prefixes get
routes with that MTU beside the cluster's (`forwarder.routes`): by them the kernel tells pods to send less,
and fragments what may be fragmented. All but `Prober` is pure.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self, TypeAlias

from forwarder.addresses import Address, Network
from forwarder.peers import PeerPath, PeerRecord

LOOK_SECONDS: Final = 0.25
"""Between two looks at a peer's path: about TCP's first retransmission, so that the next one gets through."""

LOOK_PEERS: Final = 256
"""In one go on the event loop, at some 3 microseconds each."""

MIN_PAUSE_SECONDS: Final = 0.05
"""After each go. From some 1,300 peers on, a look at all takes longer than LOOK_SECONDS."""

MIN_IPV6_MTU_BYTES: Final = 1280  # RFC 8200 section 5

MAX_NAMED: Final = 10
"""Peers in one line of news: of a shrunken device all of them are in it."""

# linux/in.h, linux/in6.h
IP_MTU: Final = 14
IPV6_MTU: Final = 24


class Prober:
    """Asks what the kernel would let through to an endpoint. Sends nothing."""

    def __init__(self, endpoints: Iterable[Address]) -> None:
        """`endpoints` are this node's own, from which its datagrams come."""
        self._sockets: dict[int, socket.socket] = {}
        for endpoint in endpoints:
            family = socket.AF_INET if endpoint.version == 4 else socket.AF_INET6
            self._sockets[endpoint.version] = sock = socket.socket(family, socket.SOCK_DGRAM)
            with suppress(OSError):  # Where the address is gone for a while, there is no route either.
                sock.bind((str(endpoint), 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets.values():
            sock.close()

    def ask(self, endpoint: Address, port: int) -> int | None:
        """The path MTU, outer IP header included; None if there is no route now."""
        sock = self._sockets[endpoint.version]
        try:
            # Looks the route up anew, with what was learned about it.
            sock.connect((str(endpoint), port))
            if endpoint.version == 4:
                return sock.getsockopt(socket.IPPROTO_IP, IP_MTU)
            return sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
        except OSError:
            return None


def slices(node_ids: Sequence[str]) -> Iterator[tuple[Sequence[str], float]]:
    """The peers to look at in one go, and the seconds to wait then. At least one, if only to wait."""
    starts = range(0, max(len(node_ids), 1), LOOK_PEERS)
    pause = max(LOOK_SECONDS / len(starts), MIN_PAUSE_SECONDS)
    for start in starts:
        yield node_ids[start : start + LOOK_PEERS], pause


@dataclass(frozen=True, slots=True)
class Measured:
    """The path MTU to an endpoint of this IP version, or None: see Prober.ask."""

    version: int
    path_mtu_bytes: int | None


ShortPaths: TypeAlias = Mapping[str, int]
"""By node id the path MTU, outer IP header included, of peers whose path carries less than the device."""


def learn(
    measured: Mapping[str, Measured], short: ShortPaths, device_mtu_bytes: Mapping[int, int]
) -> dict[str, int | None]:
    """What changes in `short`, None for a path that is not short any more. `device_mtu_bytes` is, by IP
    version, what the node counts on. Without a route there is nothing new to know."""
    changed: dict[str, int | None] = {}
    for node_id, found in measured.items():
        if found.path_mtu_bytes is None:
            continue
        is_short = found.path_mtu_bytes < device_mtu_bytes[found.version]
        now_short = found.path_mtu_bytes if is_short else None
        if now_short != short.get(node_id):
            changed[node_id] = now_short
    return changed


def news(changed: Mapping[str, int | None], peers: Iterable[tuple[PeerRecord, PeerPath]]) -> Iterator[str]:
    """What to tell of the changes that `learn` gave, whose peers these are."""
    short = [f"{node_id} ({mtu_bytes})" for node_id, mtu_bytes in changed.items() if mtu_bytes is not None]
    if short:
        yield f"the path MTU is less than the device's to {some(short)}"
    full = [node_id for node_id, mtu_bytes in changed.items() if mtu_bytes is None]
    if full:
        yield f"the path MTU is the device's again to {some(full)}"
    without_ipv6 = [
        record.id
        for record, path in peers
        if path.mtu_bytes < MIN_IPV6_MTU_BYTES and any(prefix.version == 6 for prefix in record.prefixes)
    ]
    if without_ipv6:
        yield (
            f"IPv6 needs an MTU of {MIN_IPV6_MTU_BYTES}, and less is left to {some(without_ipv6)}: its "
            "packets that do not fit are dropped (TOO_BIG); raise the MTU on the way there"
        )


def some(names: Sequence[str]) -> str:
    """No more than MAX_NAMED of them, and how many there are besides."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def prefix_mtus(peers: Iterable[tuple[PeerRecord, PeerPath]], mtu_bytes: int) -> dict[Network, int]:
    """The prefixes that need a smaller MTU than the pods' own, `mtu_bytes`, and that MTU. IPv6 has no packet
    too big for a smaller one than MIN_IPV6_MTU_BYTES: nothing could be told."""
    return {
        prefix: path.mtu_bytes
        for record, path in peers
        if path.mtu_bytes < mtu_bytes
        for prefix in record.prefixes
        if prefix.version == 4 or path.mtu_bytes >= MIN_IPV6_MTU_BYTES
    }
