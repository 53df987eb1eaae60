"""The peers that stand: what the fast path holds of them, what their paths carry, and the kernel's routes.

One change of the peers or of a path costs what it changes. The registry, the fast path and the routes never
part: whatever is taken over by one is taken over by all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Any, Final

from forwarder import paths
from forwarder.addresses import Network, format_mac
from forwarder.dataplane import MAX_SLOTS, DataPlane
from forwarder.garbage import many_objects
from forwarder.kernel_routes import RouteKeeper
from forwarder.legs import Way, describe_ways
from forwarder.paths import Measured, Prober
from forwarder.peers import (
    HEALTH,
    OPTION_BYTES,
    OVERHEAD_BYTES,
    REMOTE_CHECKSUM,
    ROAMING,
    Local,
    PeerPath,
    PeerRecord,
    Tables,
    diff,
    tables_for,
)
from forwarder.probing import Probing
from forwarder.reconcile import Operation, Wiring
from forwarder.registry import Delta, Registry, Said
from forwarder.roaming import Place, Roaming

log = logging.getLogger("podloom")

MAX_REFUSALS_TOLD: Final = 10
"""Of refused records in the log and in `status`: there may be as many as somebody likes to write."""


class Neighbourhood:
    """Tell it what a source says; let `watch_paths` run beside that."""

    def __init__(
        self,
        local: Local,
        features: tuple[str, ...],
        mtus: Mapping[int, int],
        wiring: Wiring,
        dataplane: DataPlane,
        probing: Probing,
        keeper: RouteKeeper,
        roaming: Roaming | None,
        changed: Callable[[], None],
    ) -> None:
        """`features` are this node's; `mtus` is by the underlay's IP version the largest inner IP packet.
        `roaming` is there if peers may be elsewhere than they say. `changed` is called whenever other
        records stand than before."""
        self._endpoints = local.endpoints
        self._features = features
        self._mtus = mtus
        self._inner_mtu_bytes = wiring.mtu_bytes
        self._dataplane = dataplane
        self._probing = probing
        self._roaming = roaming
        self._changed = changed
        self._registry = Registry(local, capacity=MAX_SLOTS - 1)
        self._records: dict[str, PeerRecord] = {}
        self._slots: dict[str, int] = {}
        self._free: dict[int, None] = {}
        """Slots that were in use, and are not; the first that never was is `_next_slot`."""
        self._next_slot = 1
        self._paths: dict[int, PeerPath] = {}
        self._short_paths: dict[str, int] = {}
        self._moved: dict[str, Place] = {}
        self._keeper = keeper
        self._routes_due = False
        """Whether other routes may be needed than there are: with thousands of short paths that takes a while
        to find out."""
        self._judging = asyncio.Lock()
        """While a worker thread has the registry."""
        self._refusals: tuple[str, ...] = ()

    # What a source says

    @property
    def records(self) -> Mapping[str, PeerRecord]:
        """By node id."""
        return self._records

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why records are refused, of the first that are."""
        return self._refusals

    def recall(self, said: Mapping[str, Said]) -> None:
        """Begin with the records of last time."""
        self._take_over(self._registry.replace(said))

    async def replace(self, said: Mapping[str, Said]) -> None:
        async with self._judging:
            with many_objects():
                # In a thread: packets would wait while thousands of records are judged.
                judging = asyncio.ensure_future(asyncio.to_thread(self._registry.replace, said))
                try:
                    await asyncio.shield(judging)
                finally:
                    # Also when cancelled: the registry and the fast path must not part.
                    await asyncio.wait([judging])
                    self._take_over(judging.result())

    async def replan(self, local: Local, mtus: Mapping[int, int], inner_mtu_bytes: int) -> None:
        """This node is elsewhere, or its devices carry another MTU than before: of every peer's path anew
        what follows from that."""
        async with self._judging:
            self._replan(local, mtus, inner_mtu_bytes)

    def _replan(self, local: Local, mtus: Mapping[int, int], inner_mtu_bytes: int) -> None:
        if moves := local.endpoints != self._endpoints:
            # What was measured was another way.
            self._short_paths = {}
            for node_id in self._records:
                self._probing.forget(node_id)
        before = self._tables_for(self._records.values())
        if moves:
            self._moved = {}  # who was found will be found again from here
        delta = self._registry.relocate(local)
        self._endpoints, self._mtus, self._inner_mtu_bytes = local.endpoints, mtus, inner_mtu_bytes
        for node_id, record in delta.items():
            if record is None:
                del self._records[node_id]
                self._free[self._slots.pop(node_id)] = None
                self._moved.pop(node_id, None)
                self._probing.forget(node_id)
                if self._roaming is not None:
                    self._roaming.remove(node_id)
            else:
                self._records[node_id] = record
                self._look_for(record)
        after = self._tables_for(self._records.values())
        self._dataplane.apply(diff(before, after))
        self._occupy(after.slots)
        self._paths = dict(after.paths)
        for record in self._records.values() if moves else ():
            self._follow_health(record)
        self._routes_due = True
        if delta:
            self._changed()

    async def repair(self, wiring: Wiring) -> list[Operation]:
        """Bring the kernel to the wanted state, the routes among it; what had to be done."""
        return await self._keeper.repair(wiring)

    def upsert(self, key: str, said: Said) -> None:
        self._take_over(self._registry.upsert(key, said))

    def remove(self, key: str) -> None:
        self._take_over(self._registry.remove(key))

    def tell_refusals(self) -> None:
        """Log each refusal once."""
        refusals = tuple(map(str, islice(self._registry.faults, MAX_REFUSALS_TOLD)))
        for refusal in refusals:
            if refusal not in self._refusals:
                log.error("a peer's record is refused: %s", refusal)
        self._refusals = refusals

    def _take_over(self, delta: Delta) -> None:
        """Bring the fast path to what stands now."""
        if not delta:
            return
        if self._moved:
            self._make_way(delta)
        old = [self._records[node_id] for node_id in delta if node_id in self._records]
        new = [record for record in delta.values() if record is not None]
        before = self._tables_for(old)
        for node_id, record in delta.items():
            if record is None and (slot := self._slots.pop(node_id, None)) is not None:
                self._free[slot] = None
            before_it = self._records.get(node_id)
            if record is None or (before_it is not None and _places(record) != _places(before_it)):
                self._short_paths.pop(node_id, None)
                self._moved.pop(node_id, None)
                self._probing.forget(node_id)
                if self._roaming is not None:
                    self._roaming.remove(node_id)
        after = self._tables_for(new)
        changes = diff(before, after)
        self._dataplane.apply(changes)
        for slot in before.paths:
            self._paths.pop(slot, None)
        self._occupy(after.slots)
        self._paths.update(after.paths)
        count = len(self._records)
        for record in old:
            del self._records[record.id]
        self._records.update((record.id, record) for record in new)
        for record in new:
            self._follow_health(record)
            self._look_for(record)
        self._routes_due = True
        self._changed()
        log.info("%d peers (%d before), %d changes", len(self._records), count, len(changes))

    def _make_way(self, delta: Delta) -> None:
        """Whoever was found at an address that a record says is its own is not there any more."""
        said = {address for record in delta.values() if record is not None for address in record.endpoints}
        for node_id in [node_id for node_id, (address, _) in self._moved.items() if address in said]:
            self._put(self._records[node_id], None)

    def move(self, node_id: str, place: Place) -> None:
        """A peer has proved to be at a place, which its record says or does not. No peer has another's
        address: the sender of a packet is known by it."""
        record = self._records.get(node_id)
        if record is None or place[0].version not in self._mtus:
            return
        if self._dataplane.owner_of(place[0]) in (None, self._slots[node_id]):
            self._put(record, None if place in _places(record) else place)

    def _put(self, record: PeerRecord, place: Place | None) -> None:
        """Reach a peer at a place from now on, or where its record says."""
        before = self._tables_for([record])
        self._short_paths.pop(record.id, None)
        self._moved.pop(record.id, None)
        if place is not None:
            self._moved[record.id] = place
        after = self._tables_for([record])
        self._dataplane.apply(diff(before, after))
        self._paths.update(after.paths)
        self._follow_health(record)
        self._routes_due = True
        path = self._path_of(record)
        log.info("%s is reached at %s, UDP port %d", record.id, path.endpoint, path.port)

    def places_of(self, node_id: str) -> Collection[Place]:
        """Where a peer is known to be."""
        if node_id in self._moved:
            return (self._moved[node_id],)
        record = self._records.get(node_id)
        return () if record is None else _places(record)

    def path_to(self, node_id: str) -> PeerPath | None:
        slot = self._slots.get(node_id)
        return None if slot is None else self._paths[slot]

    def in_slot(self, slot: int | None) -> str | None:
        """The peer whose slot in the fast path that is."""
        return next((node_id for node_id, its in self._slots.items() if its == slot), None)

    def _follow_health(self, record: PeerRecord) -> None:
        """Probe a peer that has agreed to it; no other."""
        if HEALTH in record.features and HEALTH in self._features:
            self._probing.follow(record.id, self._slots[record.id], self._path_of(record).endpoint.version)
        else:
            self._probing.forget(record.id)

    def _occupy(self, slots: Mapping[str, int]) -> None:
        self._slots.update(slots)
        for slot in slots.values():
            self._free.pop(slot, None)
            self._next_slot = max(self._next_slot, slot + 1)

    def _look_for(self, record: PeerRecord) -> None:
        """Let a peer be found elsewhere that has agreed to it."""
        if self._roaming is None:
            return
        if ROAMING in record.features:
            self._roaming.add(record.id, time.monotonic())
        else:
            self._roaming.remove(record.id)

    def _tables_for(self, records: Iterable[PeerRecord]) -> Tables:
        return tables_for(
            records,
            previous=self._slots,
            mtu_bytes=self._mtus,
            max_slots=MAX_SLOTS,
            free=chain(self._free, range(self._next_slot, MAX_SLOTS)),
            short_paths=self._short_paths,
            features=self._features,
            moved=self._moved,
        )

    # What the paths carry

    async def watch_paths(self) -> None:
        """Keep the fast path and the routes to what the paths carry, until cancelled."""
        while True:
            endpoints = self._endpoints
            with Prober(endpoints) as prober:
                for node_ids, pause in paths.slices(list(self._records)):
                    self._measure_paths(prober, node_ids)
                    await self._route_short_paths()
                    await asyncio.sleep(pause)
                    if endpoints != self._endpoints:
                        break

    def _measure_paths(self, prober: Prober, node_ids: Iterable[str]) -> None:
        """Ask for these peers' path MTUs, and have them sent no more than that."""
        measured = {}
        for node_id in node_ids:
            if node_id in self._records:  # It may have gone since the round began.
                path = self._path_of(self._records[node_id])
                asked = prober.ask(path.endpoint, path.port)
                carried = None if asked is None else self._probing.carried(node_id, asked)
                measured[node_id] = Measured(path.endpoint.version, carried)
        changed = paths.learn(measured, self._short_paths, self._device_mtus())
        if not changed:
            return
        records = [self._records[node_id] for node_id in changed]
        before = self._tables_for(records)
        for node_id, path_mtu_bytes in changed.items():
            if path_mtu_bytes is None:
                del self._short_paths[node_id]
            else:
                self._short_paths[node_id] = path_mtu_bytes
        after = self._tables_for(records)
        self._dataplane.apply(diff(before, after))
        self._paths.update(after.paths)
        self._routes_due = True
        for sentence in paths.news(changed, [(record, self._path_of(record)) for record in records]):
            log.warning("%s", sentence)

    def _device_mtus(self) -> dict[int, int]:
        options = OPTION_BYTES if REMOTE_CHECKSUM in self._features else 0
        return {version: mtu + OVERHEAD_BYTES[version] + options for version, mtu in self._mtus.items()}

    async def _route_short_paths(self) -> None:
        """Bring the kernel's routes to what the paths carry: by them it tells pods."""
        if self._routes_due:
            self._routes_due = False
            records = (self._records[node_id] for node_id in self._short_paths)
            short = ((record, self._path_of(record)) for record in records)
            self._keeper.mtus = paths.prefix_mtus(short, self._inner_mtu_bytes)
        await self._keeper.settle()

    def _path_of(self, record: PeerRecord) -> PeerPath:
        return self._paths[self._slots[record.id]]

    # What people ask

    def describe(self, way: Callable[[PeerRecord, Network], Way]) -> list[dict[str, Any]]:
        """Every peer, how it is reached and what went there, for `podloom peers`."""
        return [self._describe(record, way) for record in self._records.values()]

    def _describe(self, record: PeerRecord, way: Callable[[PeerRecord, Network], Way]) -> dict[str, Any]:
        slot = self._slots[record.id]
        path = self._paths[slot]
        ways = {prefix: way(record, prefix) for prefix in record.prefixes}
        return {
            "id": record.id,
            "endpoint": str(path.endpoint),
            "endpoints": [str(endpoint) for endpoint in record.endpoints],
            "encapsulation": path.encapsulation,
            "port": path.port,
            "vni": path.vni,
            "mtu": path.mtu_bytes,
            "path_mtu": self._short_paths.get(record.id),
            "moved": record.id in self._moved,
            "health": self._probing.describe(record.id),
            "router_mac": format_mac(path.router_mac),
            "prefixes": [str(prefix) for prefix in record.prefixes],
            **describe_ways(ways),
            "counters": dict(self._dataplane.peer_counters(slot)),
        }


def _places(record: PeerRecord) -> tuple[Place, ...]:
    return tuple((endpoint, record.port) for endpoint in record.endpoints)
