"""Who the other nodes are, and what of it the fast path must know. Pure.

A *record* says what a node told of itself. *Tables* are what the fast path should hold for a set of
records; `diff` gives the changes from one state of the tables to the next. Everything is compared by
value: a peer that keeps its id and changes its address is a change like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from forwarder.addresses import Address, Network, format_mac
from forwarder.faults import Fault

OVERHEAD_BYTES = {4: 50, 6: 70}
"""By the underlay's IP version: outer IP, UDP, Geneve or VXLAN without options, inner Ethernet."""


REMOTE_CHECKSUM = "remote-checksum"
"""Inner TCP and UDP checksums left to the receiver's host, under a Geneve option."""

HEALTH = "health"
"""Probes of the path between two nodes, as forwarder.health sends and answers them."""

DIRECT = "direct"
"""Takes its pods' packets without a tunnel from nodes of its segment, and answers BFD."""

ROAMING = "roaming"
"""Being found by authentic probes where the record does not say, as forwarder.roaming does it."""

FEATURES = (REMOTE_CHECKSUM, HEALTH, DIRECT, ROAMING)

OPTION_BYTES = 4
"""What the Geneve option of REMOTE_CHECKSUM adds to a datagram."""


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """One other node. `endpoints` are one or two outer addresses, the preferred first; `vni` is the one
    it wants to be sent."""

    id: str
    endpoints: tuple[Address, ...]
    port: int
    encapsulation: str
    vni: int
    router_mac: bytes
    prefixes: tuple[Network, ...]
    features: tuple[str, ...] = ()
    """What it can do besides, of FEATURES: used where we can, too."""


@dataclass(frozen=True, slots=True)
class Local:
    """What of this node its peers' records are checked against; id and MAC may not be known yet."""

    id: str | None
    router_mac: bytes | None
    endpoints: tuple[Address, ...]
    prefixes: tuple[Network, ...]
    cluster_cidrs: tuple[Network, ...]


def check(records: Sequence[PeerRecord], local: Local, keys: Sequence[str] | None = None) -> list[Fault]:
    """What makes these records impossible together, or impossible as peers of this node. `keys` name the
    records in the faults; peer[0], peer[1] and so on if not given."""
    keyed = list(zip(keys or [f"peer[{index}]" for index in range(len(records))], records, strict=True))
    alone = (fault for key, record in keyed for fault in check_alone(key, record, local))
    return [*alone, *_check_unique(keyed), *_check_overlaps(keyed, local)]


_Keyed: TypeAlias = Sequence[tuple[str, PeerRecord]]


def check_alone(key: str, record: PeerRecord, local: Local) -> Iterator[Fault]:
    """What makes a record impossible as a peer of this node, whoever else there is."""
    families = {endpoint.version for endpoint in local.endpoints}
    if record.id == local.id:
        yield Fault(f"{key}.id", record.id, "is this node's own id; must name another node")
    if record.router_mac == local.router_mac:
        mac = format_mac(record.router_mac)
        yield Fault(f"{key}.router_mac", mac, "is this node's own; must be another node's")
    for index, endpoint in enumerate(record.endpoints):
        if endpoint in local.endpoints:
            allowed = "is this node's own; must be another node's address"
            yield Fault(f"{key}.endpoints[{index}]", endpoint, allowed)
        if any(endpoint in cidr for cidr in local.cluster_cidrs):
            allowed = "must be an underlay address, outside cluster.cidrs"
            yield Fault(f"{key}.endpoints[{index}]", endpoint, allowed)
    # Without endpoints yet, of a device that is still to be looked at.
    if families and families.isdisjoint(endpoint.version for endpoint in record.endpoints):
        shared = " or ".join(f"IPv{version}" for version in sorted(families))
        value = [str(endpoint) for endpoint in record.endpoints]
        yield Fault(f"{key}.endpoints", value, f"must hold an {shared} address, as node.endpoints does")
    for index, prefix in enumerate(record.prefixes):
        if not any(is_inside(prefix, cidr) for cidr in local.cluster_cidrs):
            yield Fault(f"{key}.prefixes[{index}]", prefix, "must lie inside one of cluster.cidrs")


def _check_unique(keyed: _Keyed) -> Iterator[Fault]:
    ids: dict[str, str] = {}
    endpoints: dict[Address, str] = {}
    for key, record in keyed:
        first = ids.setdefault(record.id, key)
        if first != key:
            yield Fault(f"{key}.id", record.id, f"must be unique; {first} has it")
        for index, endpoint in enumerate(record.endpoints):
            first = endpoints.setdefault(endpoint, key)
            if first != key:
                yield Fault(f"{key}.endpoints[{index}]", endpoint, f"must be one peer's only; {first} has it")


def _check_overlaps(keyed: _Keyed, local: Local) -> Iterator[Fault]:
    ours = "node.prefixes"
    named = [NamedPrefix(prefix, ours) for prefix in local.prefixes]
    named += [
        NamedPrefix(prefix, f"{key}.prefixes[{index}]")
        for key, record in keyed
        for index, prefix in enumerate(record.prefixes)
    ]
    for one, other in overlaps(named):
        if one.key == ours:
            one, other = other, one
        if one.key != ours:
            yield Fault(one.key, one.prefix, f"must not overlap {other.prefix} of {other.key}")


class NamedPrefix(NamedTuple):
    prefix: Network
    key: str


def overlaps(named: Iterable[NamedPrefix]) -> Iterator[tuple[NamedPrefix, NamedPrefix]]:
    """Each prefix that lies in one sorted before it, and that one. O(n log n)."""
    widest: NamedPrefix | None = None
    for item in sorted(named, key=_by_address):
        if widest is not None and is_inside(item.prefix, widest.prefix):
            yield item, widest
        else:
            widest = item


def _by_address(item: NamedPrefix) -> tuple[int, int, int]:
    return item.prefix.version, int(item.prefix.network_address), item.prefix.prefixlen


def is_inside(inner: Network, outer: Network) -> bool:
    """Whether every address of `inner` is in `outer`; False across IP versions."""
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and inner.network_address in outer
    )


@dataclass(frozen=True, slots=True)
class PeerPath:
    """How a slot's peer is reached. `mtu_bytes` is the largest inner IP packet."""

    encapsulation: str
    vni: int
    router_mac: bytes
    endpoint: Address
    port: int
    mtu_bytes: int
    partial_checksums: bool = False
    from_home: bool = False
    """Whether all its datagrams leave from the port we receive on: the one that a NAT lets in."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the fast path holds of the peers: slot by node id, and three maps to slots."""

    slots: Mapping[str, int] = field(default_factory=dict)
    paths: Mapping[int, PeerPath] = field(default_factory=dict)
    sources: Mapping[Address, int] = field(default_factory=dict)
    prefixes: Mapping[Network, int] = field(default_factory=dict)


class TooManyPeersError(ValueError):
    pass


def tables_for(
    records: Iterable[PeerRecord],
    *,
    previous: Mapping[str, int],
    mtu_bytes: Mapping[int, int],
    max_slots: int,
    free: Iterable[int] | None = None,
    short_paths: Mapping[str, int] = MappingProxyType({}),
    features: Collection[str] = (),
    moved: Mapping[str, tuple[Address, int]] = MappingProxyType({}),
) -> Tables:
    """The tables for checked records. A node keeps its slot of `previous`, or gets a `free` one: any below
    `max_slots` that none of these nodes has, if nothing is said. `mtu_bytes` is the largest inner IP packet
    by the underlay's IP version, and its keys are the versions this node can send; `short_paths` is by node
    id the path MTU where that leaves less; `features` are this node's; `moved` is by node id the address and
    port of those that were found elsewhere than they say."""
    records = list(records)
    slots = {record.id: previous[record.id] for record in records if record.id in previous}
    taken = set(slots.values())
    unused = (slot for slot in (range(1, max_slots) if free is None else free) if slot not in taken)
    paths: dict[int, PeerPath] = {}
    sources: dict[Address, int] = {}
    prefixes: dict[Network, int] = {}
    for record in records:
        if record.id not in slots:
            slot = next(unused, None)
            if slot is None:
                raise TooManyPeersError(f"{len(records)} peers: must be at most {max_slots - 1}")
            slots[record.id] = slot
        slot = slots[record.id]
        said = next(address for address in record.endpoints if address.version in mtu_bytes)
        endpoint, port = moved.get(record.id, (said, record.port))
        partial_checksums = (
            REMOTE_CHECKSUM in features
            and REMOTE_CHECKSUM in record.features
            and record.encapsulation == "geneve"
        )
        inner_mtu_bytes = mtu_bytes[endpoint.version]
        if record.id in short_paths:
            overhead = OVERHEAD_BYTES[endpoint.version] + (OPTION_BYTES if partial_checksums else 0)
            inner_mtu_bytes = min(inner_mtu_bytes, short_paths[record.id] - overhead)
        paths[slot] = PeerPath(
            encapsulation=record.encapsulation,
            vni=record.vni,
            router_mac=record.router_mac,
            endpoint=endpoint,
            port=port,
            mtu_bytes=inner_mtu_bytes,
            partial_checksums=partial_checksums,
            from_home=record.id in moved,
        )
        sources.update(dict.fromkeys((*record.endpoints, endpoint), slot))
        prefixes.update(dict.fromkeys(record.prefixes, slot))
    return Tables(slots, paths, sources, prefixes)


@dataclass(frozen=True, slots=True)
class ForgetSource:
    address: Address


@dataclass(frozen=True, slots=True)
class RemovePrefix:
    prefix: Network


@dataclass(frozen=True, slots=True)
class ClearSlot:
    """Forgets the slot's path, its counters and every source that leads to it."""

    slot: int


@dataclass(frozen=True, slots=True)
class SetPath:
    slot: int
    path: PeerPath


@dataclass(frozen=True, slots=True)
class AllowSource:
    address: Address
    slot: int


@dataclass(frozen=True, slots=True)
class InsertPrefix:
    """Adds the prefix or repoints it."""

    prefix: Network
    slot: int


Change: TypeAlias = ForgetSource | RemovePrefix | ClearSlot | SetPath | AllowSource | InsertPrefix


def diff(old: Tables, new: Tables) -> tuple[Change, ...]:
    """The changes that turn `old` into `new`, in an order in which each is possible: what leaves first,
    so that an address or a slot may pass from one peer to another; a prefix that moves is repointed
    and never absent."""
    stays = {slot for node_id, slot in old.slots.items() if new.slots.get(node_id) == slot}
    old_sources = {address: slot for address, slot in old.sources.items() if slot in stays}
    old_paths = {slot: path for slot, path in old.paths.items() if slot in stays}
    return (
        *(ForgetSource(address) for address, slot in old_sources.items() if new.sources.get(address) != slot),
        *(RemovePrefix(prefix) for prefix in old.prefixes if prefix not in new.prefixes),
        *(ClearSlot(slot) for slot in old.slots.values() if slot not in stays),
        *(SetPath(slot, path) for slot, path in new.paths.items() if old_paths.get(slot) != path),
        *(
            AllowSource(address, slot)
            for address, slot in new.sources.items()
            if old_sources.get(address) != slot
        ),
        *(
            InsertPrefix(prefix, slot)
            for prefix, slot in new.prefixes.items()
            if old.prefixes.get(prefix) != slot
        ),
    )
