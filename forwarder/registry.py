"""Which of what the sources say of the peers can stand together. Pure.

A source names each thing it says by a *key*. What cannot be a peer of this node, or excludes a peer that
stands already, is refused with its key and the reason; the rest stands. A key that says something refused
keeps the last good record it had, and what was refused for another's sake is tried again when that leaves.
Each change costs what it changes, however many peers there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from forwarder.addresses import Address, Network
from forwarder.faults import Fault
from forwarder.peers import Local, PeerRecord, check_alone


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a source found where a record should be, and why it is none."""

    faults: tuple[Fault, ...]


Said: TypeAlias = PeerRecord | Refusal
Delta: TypeAlias = Mapping[str, PeerRecord | None]
"""By node id the record that stands now, None if none does any more; what did not change is absent."""

OURS = "node.prefixes"


class Registry:
    """`records` is by node id, `faults` by key: what stands, and what does not and why."""

    def __init__(self, local: Local, capacity: int) -> None:
        """At most `capacity` records stand at once."""
        self._local = local
        self._capacity = capacity
        self._standing: dict[str, PeerRecord] = {}
        self._refused: dict[str, tuple[PeerRecord | None, tuple[Fault, ...]]] = {}
        self._forget_all()

    def _forget_all(self) -> None:
        self._keys: dict[str, str] = {}
        self._endpoints: dict[Address, str] = {}
        self._ranges = _Ranges()
        for prefix in self._local.prefixes:
            self._ranges.add(prefix, OURS)

    @property
    def records(self) -> dict[str, PeerRecord]:
        return {record.id: record for record in self._standing.values()}

    @property
    def faults(self) -> Iterator[Fault]:
        for _, faults in self._refused.values():
            yield from faults

    def replace(self, said: Mapping[str, Said]) -> Delta:
        """Everything a source says. Of what excludes each other the first stands."""
        before, last_good = self.records, self._standing
        self._forget_all()
        self._standing, self._refused = {}, {}
        for key, value in said.items():
            if not self._try(key, value) and key in last_good:
                self._stand_if_possible(key, last_good[key])
        after = self.records
        delta: dict[str, PeerRecord | None] = {
            node_id: record for node_id, record in after.items() if before.get(node_id) != record
        }
        return delta | dict.fromkeys(before.keys() - after.keys())

    def upsert(self, key: str, said: Said) -> Delta:
        """One key says something new."""
        old = self._standing.get(key)
        if said == old:
            self._refused.pop(key, None)
            return {}
        if old is not None:
            self._leave(key)
        if self._try(key, said):
            return self._delta(old, key) | (self._try_refused() if old is not None else {})
        if old is not None:
            self._stand(key, old)
        return {}

    def remove(self, key: str) -> Delta:
        """One key is gone."""
        self._refused.pop(key, None)
        old = self._standing.get(key)
        if old is None:
            return {}
        self._leave(key)
        return {old.id: None, **self._try_refused()}

    def _delta(self, old: PeerRecord | None, key: str) -> dict[str, PeerRecord | None]:
        new = self._standing[key]
        gone: dict[str, PeerRecord | None] = {} if old is None else {old.id: None}
        return gone | {new.id: new}

    def _try_refused(self) -> dict[str, PeerRecord | None]:
        delta: dict[str, PeerRecord | None] = {}
        for key, (record, _) in list(self._refused.items()):
            if record is None:
                continue  # It is impossible whoever else there is.
            old = self._standing.get(key)
            if old is not None:
                self._leave(key)
            if self._try(key, record):
                delta |= self._delta(old, key)
            elif old is not None:
                self._stand(key, old)
        return delta

    def _try(self, key: str, said: Said) -> bool:
        """Let it stand, or note why it cannot."""
        if isinstance(said, Refusal):
            self._refused[key] = None, said.faults
            return False
        if alone := tuple(check_alone(key, said, self._local)):
            self._refused[key] = None, alone
            return False
        if together := tuple(self._conflicts(key, said)):
            self._refused[key] = said, together
            return False
        self._refused.pop(key, None)
        self._stand(key, said)
        return True

    def _stand_if_possible(self, key: str, record: PeerRecord) -> None:
        if not any(check_alone(key, record, self._local)) and not any(self._conflicts(key, record)):
            self._stand(key, record)

    def _conflicts(self, key: str, record: PeerRecord) -> Iterator[Fault]:
        if len(self._standing) >= self._capacity:
            yield Fault(
                f"{key}.id", record.id, f"is one more than the {self._capacity} peers a node can have"
            )
        if record.id in self._keys:
            yield Fault(f"{key}.id", record.id, f"must be unique; {self._keys[record.id]} has it")
        for index, endpoint in enumerate(record.endpoints):
            if endpoint in self._endpoints:
                first = self._endpoints[endpoint]
                yield Fault(f"{key}.endpoints[{index}]", endpoint, f"must be one peer's only; {first} has it")
        for index, prefix in enumerate(record.prefixes):
            for other, owner in self._ranges.overlapping(prefix):
                yield Fault(f"{key}.prefixes[{index}]", prefix, f"must not overlap {other} of {owner}")
        for index, prefix in enumerate(record.prefixes):
            if any(prefix.overlaps(other) for other in _same_version(record.prefixes[:index], prefix)):
                yield Fault(f"{key}.prefixes[{index}]", prefix, "must not overlap another of the same record")

    def _stand(self, key: str, record: PeerRecord) -> None:
        self._standing[key] = record
        self._keys[record.id] = key
        self._endpoints.update(dict.fromkeys(record.endpoints, key))
        for prefix in record.prefixes:
            self._ranges.add(prefix, key)

    def _leave(self, key: str) -> None:
        record = self._standing.pop(key)
        del self._keys[record.id]
        for endpoint in record.endpoints:
            del self._endpoints[endpoint]
        for prefix in record.prefixes:
            self._ranges.discard(prefix)


def _same_version(prefixes: Iterable[Network], prefix: Network) -> Iterator[Network]:
    return (other for other in prefixes if other.version == prefix.version)


class _Ranges:
    """Disjoint prefixes in the order of their addresses, and whose they are."""

    def __init__(self) -> None:
        self._firsts: dict[int, list[int]] = {4: [], 6: []}
        self._owners: dict[tuple[int, int], tuple[Network, str]] = {}

    def add(self, prefix: Network, owner: str) -> None:
        first = int(prefix.network_address)
        insort(self._firsts[prefix.version], first)
        self._owners[prefix.version, first] = prefix, owner

    def discard(self, prefix: Network) -> None:
        firsts, first = self._firsts[prefix.version], int(prefix.network_address)
        del firsts[bisect_left(firsts, first)]
        del self._owners[prefix.version, first]

    def overlapping(self, prefix: Network) -> Iterator[tuple[Network, str]]:
        """Those that share an address with the prefix. Only one that begins before it can reach into it."""
        firsts = self._firsts[prefix.version]
        start = bisect_right(firsts, int(prefix.network_address))
        end = bisect_right(firsts, int(prefix.broadcast_address))
        for first in firsts[max(0, start - 1) : end]:
            other, owner = self._owners[prefix.version, first]
            if int(other.broadcast_address) >= int(prefix.network_address):
                yield other, owner
