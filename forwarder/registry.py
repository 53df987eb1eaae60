"""Which of what the sources say of the peers can stand together. Pure.

A source names each thing it says by a *key*. What cannot be a peer of this node, or excludes a peer that
stands already, is refused with its key and the reason; the rest stands. A key that says something refused
keeps the last good record it had, unless another needs what that has; what was refused for another's sake is
tried again when that leaves.
Each change costs what it changes, however many peers there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

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

OURS: Final = "node.prefixes"

ANYBODY: Final = ""
"""Whose leaving lets those in for whom there was no place."""

MAX_TRIES: Final = 100
"""Of refused records at one change: somebody may write as many as he likes."""


class Registry:
    """`records` is by node id, `faults` by key: what stands, and what does not and why."""

    def __init__(self, local: Local, capacity: int) -> None:
        """At most `capacity` records stand at once."""
        self._local = local
        self._capacity = capacity
        self._standing: dict[str, PeerRecord] = {}
        self._refused: dict[str, tuple[PeerRecord | None, tuple[Fault, ...]]] = {}
        self._waiting: dict[str, dict[str, None]] = {}
        """By the key of a record, those that were refused for its sake, in the order they came."""
        self._before: dict[str, PeerRecord | None] = {}
        """By node id, what stood before the change under way."""
        self._keys: dict[str, str] = {}
        self._endpoints: dict[Address, str] = {}
        self._ranges = _Ranges()
        for prefix in local.prefixes:
            self._ranges.add(prefix, OURS)

    @property
    def records(self) -> dict[str, PeerRecord]:
        return {record.id: record for record in self._standing.values()}

    @property
    def faults(self) -> Iterator[Fault]:
        for _, faults in self._refused.values():
            yield from faults

    def replace(self, said: Mapping[str, Said]) -> Delta:
        """Everything a source says. Of new records that exclude each other the first stands."""
        old = {key: record for key, record in self._standing.items() if said.get(key) != record}
        for key in old:
            self._leave(key)
        self._refused, self._waiting = {}, {}
        for key in [key for key in said if key not in self._standing]:
            if not self._try(key, said[key]) and key in old:
                self._stand_if_possible(key, old[key])
        return self._delta()

    def relocate(self, local: Local) -> Delta:
        """This node is elsewhere now, with the prefixes it had: judge everything anew by that."""
        self._local = local
        for key, record in list(self._standing.items()):
            if alone := tuple(check_alone(key, record, local)):
                self._leave(key)
                self._refused[key] = record, alone
        for key, (refused, _) in list(self._refused.items()):
            if refused is not None:
                self._try_instead(key, refused)
        return self._delta()

    def upsert(self, key: str, said: Said) -> Delta:
        """One key says something new."""
        if said == self._standing.get(key):
            self._refused.pop(key, None)
            return {}
        # Nobody is kept out by a record that its own key does not say any more.
        outdated = self._outdated_in_the_way(key, said)
        old = {name: self._standing[name] for name in (key, *outdated) if name in self._standing}
        for name in old:
            self._leave(name)
        if not self._try(key, said):
            for name, record in old.items():
                self._stand(name, record)
        else:
            self._try_waiting(old)
        return self._delta()

    def remove(self, key: str) -> Delta:
        """One key is gone."""
        self._refused.pop(key, None)
        if key in self._standing:
            self._leave(key)
            self._try_waiting([key])
        return self._delta()

    def _delta(self) -> Delta:
        before, self._before = self._before, {}
        return {node_id: now for node_id, old in before.items() if (now := self._record(node_id)) != old}

    def _record(self, node_id: str) -> PeerRecord | None:
        key = self._keys.get(node_id)
        return None if key is None else self._standing[key]

    def _outdated_in_the_way(self, key: str, said: Said) -> set[str]:
        """The other keys that have what a record needs, if all have it only by their last good word."""
        if isinstance(said, Refusal) or not self._refused:
            return set()
        owners = self._owners(said) - {key}
        return owners if owners <= self._refused.keys() else set()

    def _owners(self, record: PeerRecord) -> set[str]:
        """The keys of the records that exclude this one."""
        owners = {self._keys[record.id]} if record.id in self._keys else set()
        owners |= {self._endpoints[address] for address in record.endpoints if address in self._endpoints}
        return owners | {owner for prefix in record.prefixes for _, owner in self._ranges.overlapping(prefix)}

    def _try_waiting(self, freed: Iterable[str]) -> None:
        """Try what was refused for the sake of records that are no more, a bounded number of it."""
        for owner in freed:
            if owner in self._waiting:
                self._waiting[ANYBODY] = self._waiting.pop(owner) | self._waiting.get(ANYBODY, {})
        waiting = self._waiting.get(ANYBODY, {})
        for key in list(islice(waiting, MAX_TRIES)):
            if len(self._standing) >= self._capacity:
                break
            del waiting[key]
            record, _ = self._refused.get(key, (None, ()))
            if record is None:
                continue  # It says something else by now.
            self._try_instead(key, record)

    def _try_instead(self, key: str, record: PeerRecord) -> None:
        """Let it stand in the place of the last good record of its key, or keep that."""
        old = self._standing.get(key)
        if old is not None:
            self._leave(key)
        if not self._try(key, record) and old is not None:
            self._stand(key, old)

    def _try(self, key: str, said: Said) -> bool:
        """Let it stand, or note why it cannot."""
        if isinstance(said, Refusal):
            self._refused[key] = None, said.faults
            return False
        if alone := tuple(check_alone(key, said, self._local)):
            self._refused[key] = said, alone
            return False
        if together := tuple(self._conflicts(key, said)):
            self._refused[key] = said, together
            for owner in self._owners(said) or {ANYBODY}:
                self._waiting.setdefault(owner, {})[key] = None
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
        self._before.setdefault(record.id, self._record(record.id))
        self._standing[key] = record
        self._keys[record.id] = key
        self._endpoints.update(dict.fromkeys(record.endpoints, key))
        for prefix in record.prefixes:
            self._ranges.add(prefix, key)

    def _leave(self, key: str) -> None:
        record = self._standing[key]
        self._before.setdefault(record.id, record)
        del self._standing[key]
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
