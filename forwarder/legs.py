"""Which peers' prefixes are reached by the underlay itself, without a tunnel, and why others are not. Pure.

A *leg* is a peer's prefixes of one IP version: they share a next hop, and a BFD session with the peer's
gateway proves that packets between pods' addresses pass there and back. Traffic follows the session with
hysteresis: at once into the tunnel, and back the later the more often that was needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from forwarder.addresses import Address, Network, gateway_of
from forwarder.bfd import Session, State
from forwarder.peers import DIRECT, PeerRecord, is_inside

MAX_DIRECT_PEERS: Final = 512
"""Each is two packets a second and up to two routes for each of its prefixes."""

FIRST_HOLD_SECONDS: Final = 2.0
LONGEST_HOLD_SECONDS: Final = 60.0
"""How long a path that failed must be well before it is used again: doubled with each failure."""

CALM_SECONDS: Final = 600.0
"""In use so long, a path's earlier failures are forgotten."""

HEARD_SECONDS: Final = 3.0
"""A peer that sends at all does so once a second (`bfd.SLOW_SECONDS`)."""


@dataclass(frozen=True, slots=True)
class NextHop:
    """A peer's endpoint on the segment of one of our links."""

    address: Address
    link: str


@dataclass(frozen=True, slots=True)
class Hop:
    """How a prefix can be reached directly; `used` says whether traffic is to go there, or only the
    packets that watch it."""

    next_hop: NextHop
    used: bool


@dataclass(frozen=True, slots=True)
class Way:
    """How a prefix is reached: "direct", "bgp" or "tunnel"; `why` is for people."""

    path: str
    why: str


def describe_ways(ways: Mapping[Network, Way]) -> dict[str, Any]:
    """Of one peer's prefixes, for `podloom peers`: "path" is "mixed" where they differ, "paths" has each."""
    paths = {way.path for way in ways.values()}
    return {
        "path": paths.pop() if len(paths) == 1 else "mixed",
        "why": "; ".join(dict.fromkeys(way.why for way in ways.values())),
        "paths": {str(prefix): {"path": way.path, "why": way.why} for prefix, way in ways.items()},
    }


Reached: TypeAlias = Mapping[Address, NextHop | str]
"""By peers' endpoints that this node can send to: that it is on a segment of ours, or why it is not."""


def next_hop(version: int, record: PeerRecord, reached: Reached) -> NextHop | str:
    """For the peer's prefixes of an IP version, or why there is none. An IPv4 prefix may have an IPv6 next
    hop (RFC 8950); Linux has no IPv6 route by an IPv4 one."""
    found = [
        reached[endpoint]
        for endpoint in record.endpoints
        if endpoint.version == version and endpoint in reached
    ]
    if version == 4:
        found += [
            reached[endpoint]
            for endpoint in record.endpoints
            if endpoint.version == 6 and endpoint in reached
        ]
    if not found:
        return "its IPv6 prefixes need an IPv6 endpoint on both nodes"
    return next((hop for hop in found if isinstance(hop, NextHop)), found[0])


class Damping:
    """Whether a path that is up or down is to be used."""

    def __init__(self) -> None:
        self.used = False
        self._failures = 0
        self._used_since = 0.0
        self._up_since: float | None = None

    def update(self, now: float, *, up: bool) -> None:
        if not up:
            if self.used:
                calm = now - self._used_since >= CALM_SECONDS
                self._failures = 1 if calm else self._failures + 1
            self.used, self._up_since = False, None
            return
        if self._up_since is None:
            self._up_since = now
        if not self.used and self.hold_left(now) <= 0:
            self.used, self._used_since = True, now

    @property
    def failed(self) -> bool:
        """Whether it was in use and then down, not long ago."""
        return self._failures > 0

    def hold_left(self, now: float) -> float:
        """Seconds until a path that stays up is used."""
        if self._failures == 0 or self._up_since is None:
            return 0.0
        hold = FIRST_HOLD_SECONDS * 2.0 ** min(self._failures - 1, 10)
        return self._up_since + min(hold, LONGEST_HOLD_SECONDS) - now


class Leg:
    """A peer's prefixes of one IP version. `gateway` is the peer's, at the other end of the session."""

    def __init__(self, node_id: str, hop: NextHop, gateway: Address, discriminator: int) -> None:
        self.node_id = node_id
        self.next_hop = hop
        self.gateway = gateway
        self.session = Session(discriminator)
        self._damping = Damping()
        self._last_resort = False

    @property
    def used(self) -> bool:
        return self._damping.used or self._last_resort

    def update(self, now: float, tunnel_is_down: Callable[[], bool]) -> bool:
        """Whether `used` changed. Where the tunnel is down as well, the peer's daemon may be all that is
        missing: its kernel needs none to take packets that came directly, as it did before."""
        before, up = self.used, self.session.state == State.UP
        self._damping.update(now, up=up)
        self._last_resort = not up and self._damping.failed and tunnel_is_down()
        return self.used != before

    def way(self, now: float) -> Way:
        link = self.next_hop.link
        if self._last_resort:
            return Way("direct", f"on-link by {link}: nothing is heard from it, and nothing in the tunnel")
        if self.used:
            return Way("direct", f"on-link by {link}")
        if self.session.state == State.UP:
            left = max(1, round(self._damping.hold_left(now)))
            return Way("tunnel", f"direct by {link} is well again, used in {left} s")
        heard_at = self.session.heard_at
        if heard_at is not None and now - heard_at < HEARD_SECONDS:
            return Way("tunnel", f"direct by {link}: it does not hear us")
        return Way("tunnel", f"direct by {link}: nothing is heard from it")


LegKey: TypeAlias = tuple[str, int]
"""Node id, IP version of the prefixes."""


class Legs:
    """All of a node's, and why other peers have none."""

    def __init__(self, versions: Collection[int], new_discriminator: Callable[[], int]) -> None:
        """`versions` are those of this node's own prefixes: without an address of that version there is
        nobody to answer."""
        self._versions = versions
        self._new_discriminator = new_discriminator
        self._legs: dict[LegKey, Leg] = {}
        self._by_gateway: dict[Address, Leg] = {}
        self._reasons: dict[LegKey, str] = {}

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._legs.values())

    def find(self, gateway: Address) -> Leg | None:
        return self._by_gateway.get(gateway)

    def look(self, candidates: Iterable[PeerRecord], reached: Reached, by_bgp: Set[Network]) -> bool:
        """Make the legs those that these peers can have now; whether any changed. `by_bgp` are prefixes of
        theirs that a routing daemon has routes for."""
        wanted: dict[LegKey, tuple[NextHop, Address]] = {}
        self._reasons = {}
        direct_peers: set[str] = set()
        for record in sorted(candidates, key=lambda record: record.id):
            for version in self._versions:
                prefixes = [prefix for prefix in record.prefixes if prefix.version == version]
                if not prefixes:
                    continue
                found = next_hop(version, record, reached)
                if any(prefix in by_bgp for prefix in prefixes):
                    found = "another of its prefixes goes by BGP"
                elif isinstance(found, NextHop) and not self._has_room(direct_peers, record):
                    found = f"{MAX_DIRECT_PEERS} other peers are direct"
                if isinstance(found, str):
                    self._reasons[record.id, version] = found
                else:
                    direct_peers.add(record.id)
                    wanted[record.id, version] = found, gateway_of(prefixes[0])
        return self._take(wanted)

    @staticmethod
    def _has_room(direct_peers: set[str], record: PeerRecord) -> bool:
        return record.id in direct_peers or len(direct_peers) < MAX_DIRECT_PEERS

    def _take(self, wanted: Mapping[LegKey, tuple[NextHop, Address]]) -> bool:
        kept = {key: leg for key, leg in self._legs.items() if wanted.get(key) == (leg.next_hop, leg.gateway)}
        new = {
            key: Leg(key[0], hop, gateway, self._new_discriminator())
            for key, (hop, gateway) in wanted.items()
            if key not in kept
        }
        changed = bool(new) or len(kept) != len(self._legs)
        self._legs = kept | new
        self._by_gateway = {leg.gateway: leg for leg in self._legs.values()}
        return changed

    def hops(self, records: Mapping[str, PeerRecord]) -> dict[Network, Hop]:
        """By prefix, for `routes.routes`."""
        return {
            prefix: Hop(leg.next_hop, leg.used)
            for (node_id, version), leg in self._legs.items()
            if node_id in records
            for prefix in records[node_id].prefixes
            if prefix.version == version
        }

    def way(self, record: PeerRecord, version: int, now: float) -> Way:
        """Of the peer's prefixes of that version."""
        leg = self._legs.get((record.id, version))
        if leg is not None:
            return leg.way(now)
        if DIRECT not in record.features:
            return Way("tunnel", f'its record has not the feature "{DIRECT}"')
        return Way("tunnel", self._reasons.get((record.id, version), "not looked at yet"))


def covered(
    prefixes: Iterable[Network], routes: Set[Network], cidrs: Iterable[Network]
) -> frozenset[Network]:
    """Those of the prefixes to all of which one of a routing daemon's routes leads that is narrower than
    the cluster's own, or the prefix itself."""
    lengths = {
        version: sorted({route.prefixlen for route in routes if route.version == version})
        for version in (4, 6)
    }
    found = set()
    for prefix in prefixes if routes else ():
        widest = max((cidr.prefixlen for cidr in cidrs if is_inside(prefix, cidr)), default=-1)
        if prefix in routes or any(
            prefix.supernet(new_prefix=length) in routes
            for length in lengths[prefix.version]
            if widest < length < prefix.prefixlen
        ):
            found.add(prefix)
    return frozenset(found)
