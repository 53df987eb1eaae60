"""How a node tells an etcd cluster that it is there, and keeps a prefix of its own.

Keys with leases that the node renews: its *record*, which peers read and which goes `lease_seconds` after
the node was last heard of, and for each prefix a *claim*, which holds the node's id and goes `hold_seconds`
after. So a prefix is withheld from others for a while, and its node finds it again. etcd measures both times;
a claim without a lease is kept for ever, which is how an operator reserves a prefix.

Nothing is ever overwritten: each write is a transaction on the condition that what was read still stands.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any, Final

from forwarder.addresses import Address, Network
from forwarder.boot_clock import boot_seconds
from forwarder.config import record_table
from forwarder.discovery import Announced
from forwarder.discovery.backoff import Backoff
from forwarder.discovery.etcd_client import (
    Condition,
    Deleted,
    EtcdClient,
    EtcdError,
    KeyValue,
    NothingSince,
    Put,
    Unchanged,
)
from forwarder.discovery.pools import NoPrefixError, choose
from forwarder.peers import PeerRecord, is_inside

NODES: Final = "nodes/"
CLAIMS: Final = "prefixes/"
RENEWALS_A_LEASE: Final = 3
UNTOLD: Final = "the others are not told of this node"
RACES: Final = 20
"""How often a claim is tried again at once because others took theirs meanwhile."""


class ClaimError(RuntimeError):
    """What this node must have is another's, or there is none; the text says whose it is."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Of what a node takes a prefix each, when it was given none: networks, and prefix lengths by version."""

    cidrs: tuple[Network, ...]
    lengths: dict[int, int]


@dataclass(frozen=True, slots=True)
class Terms:
    """For how long a node stays a peer without renewing, and for how long its prefix stays its own."""

    lease_seconds: int
    hold_seconds: int


@dataclass(frozen=True, slots=True)
class Leases:
    """`renewed_at` and `held_at` are when the renewals that succeeded last were asked for."""

    record: int
    hold: int
    renewed_at: float
    held_at: float


class Registration:
    """One node's record and claims. `record.prefixes` may be empty until `register` has taken some."""

    def __init__(
        self,
        client: EtcdClient,
        root: str,
        record: PeerRecord,
        pools: Pools,
        terms: Terms,
        *,
        wished: tuple[Network, ...] = (),
        clock: Callable[[], float] = boot_seconds,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`root` is what all keys begin with, with its final slash; `wished` are prefixes to take if they are
        free, since pods of this node may have addresses from them."""
        self._client = client
        self._root = root
        self._record = record
        self._pools = pools
        self._terms = terms
        self._wished = wished
        self._clock = clock
        self._sleep = sleep
        self._leases: Leases | None = None
        self._held_until: float | None = None
        self._error = "etcd does not answer"
        self._taken = ""
        self._lost = asyncio.Event()
        self._relocated = False
        self._left: set[str] = set()
        """Endpoints that this node had since it was started: a record with them is no other machine's."""

    @property
    def prefixes(self) -> tuple[Network, ...]:
        return self._record.prefixes

    @property
    def key(self) -> str:
        """Of this node's record."""
        return f"{self._root}{NODES}{self._record.id}"

    def insist(self, prefixes: tuple[Network, ...]) -> None:
        """These it is to be and no others: pods have their addresses from them."""
        self._record = replace(self._record, prefixes=prefixes)

    def relocate(self, endpoints: tuple[Address, ...]) -> None:
        """This node is at these now: `keep` tells the others at once."""
        self._left |= set(map(str, self._record.endpoints))
        self._record = replace(self._record, endpoints=endpoints)
        self._relocated = True
        self._lost.set()

    async def register(self) -> None:
        """Put the record and the claims there. EtcdError, or ClaimError if they cannot be ours."""
        self._relocated = False
        asked_at = self._clock()
        leases = Leases(
            record=await self._client.grant(self._terms.lease_seconds),
            hold=await self._client.grant(self._terms.hold_seconds),
            renewed_at=asked_at,
            held_at=asked_at,
        )
        try:
            for _ in range(RACES):
                if await self._claim(leases):
                    self._leases = leases
                    self._held_until = asked_at + self._terms.hold_seconds
                    self._taken = ""
                    if not self._relocated:  # Else what was put is out of date, and `keep` puts it again.
                        self._lost.clear()
                    return
        except ClaimError:
            # It is tried again for as long as it takes, and etcd is not to keep a lease of each try. After
            # an EtcdError nobody knows whether something has them.
            for lease in (leases.record, leases.hold):
                await self._client.revoke(lease)
            raise
        raise EtcdError(f"{RACES} times others took a prefix first")

    async def _claim(self, leases: Leases) -> bool:
        """One try; False if something changed between reading and writing."""
        found, revision = await self._client.list(f"{self._root}{CLAIMS}")
        claims = {item.key: item for item in found}
        prefixes = self._record.prefixes or self._choose(found)
        record = replace(self._record, prefixes=prefixes)
        own, _ = await self._client.list(self.key)
        mine = next((item for item in own if item.key == self.key), None)
        self._refuse_others(mine, prefixes, found)
        conditions: list[Condition] = [Unchanged(self.key, mine.modified if mine else 0)]
        puts = [Put(self.key, json.dumps(record_table(record)).encode(), leases.record)]
        for prefix in prefixes:
            key = claim_key(self._root, prefix)
            claim = claims.get(key)
            conditions.append(Unchanged(key, claim.modified if claim else 0))
            # A claim that its operator made for ever stays so.
            hold = 0 if claim is not None and claim.lease == 0 else leases.hold
            puts.append(Put(key, self._record.id.encode(), hold))
        if any(claim_key(self._root, prefix) not in claims for prefix in prefixes) and self._given_by_hand:
            # Its length may be any, so that two claims of different keys may overlap.
            conditions.append(NothingSince(f"{self._root}{CLAIMS}", revision))
        if not await self._client.commit(conditions, puts):
            return False
        self._record = replace(self._record, prefixes=prefixes)
        return True

    @property
    def _given_by_hand(self) -> bool:
        lengths = self._pools.lengths
        return any(prefix.prefixlen != lengths[prefix.version] for prefix in self._record.prefixes)

    def _choose(self, claims: Sequence[KeyValue]) -> tuple[Network, ...]:
        ours = [prefix for item in claims if (prefix := self._ours(item)) is not None]
        others = [
            prefix for item in claims if (prefix := claimed(self._root, item.key)) and prefix not in ours
        ]
        wished = [prefix for prefix in self._wished if not any(_overlap(prefix, other) for other in others)]
        chosen: list[Network] = []
        for cidr in self._pools.cidrs:
            kept = [prefix for prefix in (*ours, *wished) if is_inside(prefix, cidr)]
            try:
                chosen += kept[:1] or choose([cidr], self._pools.lengths, others, self._record.id)
            except NoPrefixError as error:
                raise ClaimError(
                    f"{error}; one becomes free when its node has been away long enough"
                ) from None
        return tuple(chosen)

    def _ours(self, item: KeyValue) -> Network | None:
        return claimed(self._root, item.key) if item.value == self._record.id.encode() else None

    def _refuse_others(
        self, mine: KeyValue | None, prefixes: Sequence[Network], claims: Sequence[KeyValue]
    ) -> None:
        ours = self._left | set(map(str, self._record.endpoints))
        if mine is not None and (others := endpoints_of(mine.value) - ours):
            raise ClaimError(
                f"the node id {self._record.id} is in use at {', '.join(sorted(others))}: if that is another "
                f"machine, remove {self._record.id!r} here (node.id, or node-id in node.state_dir)"
            )
        for item in claims:
            other = claimed(self._root, item.key)
            if other is None or self._ours(item) is not None:
                continue
            for prefix in prefixes:
                if _overlap(prefix, other):
                    owner = item.value.decode("utf-8", "backslashreplace")
                    raise ClaimError(
                        f"the prefix {prefix} cannot be this node's: {owner} has {other}; restart podloom to "
                        "take another, or correct node.prefixes"
                    )

    async def keep(self, tell: Callable[[Announced], None]) -> None:
        """Stay registered, and `tell` after each try whether we are. Never returns."""
        backoff = Backoff()
        while True:
            try:
                if self._leases is None:
                    await self.register()
                else:
                    await self._renew()
                    backoff.reset()
                if self._leases is not None:
                    tell(Announced(None))
                    await self._pause()
                    continue
            except EtcdError as error:
                self._error = str(error)
                if self._leases is None or self._lease_left() <= 0:
                    self._leases = None
                    tell(self._cut_off())
            except ClaimError as error:
                self._taken = str(error)
                tell(self._cut_off())
            await self._sleep(min(backoff.next(), self._lease_left()))

    def recheck(self) -> None:
        """The record was seen to be gone or another's."""
        self._lost.set()

    def is_ours(self, item: KeyValue | Deleted) -> bool:
        """Whether it is our record as we put it."""
        return (
            isinstance(item, KeyValue)
            and item.key == self.key
            and self._leases is not None
            and item.lease == self._leases.record
        )

    async def guard(self, tell: Callable[[Announced], None]) -> None:
        """Fence this node in time, whatever request is under way. Never returns."""
        while True:
            left = None if self._held_until is None else self._held_until - self._clock()
            if left is not None and left <= 0:
                tell(self._cut_off())
            await self._sleep(left if left is not None and left > 0 else self._terms.lease_seconds)

    def _cut_off(self) -> Announced:
        """Why the others are not told of us, and whether our prefixes are still ours.

        While etcd does not answer the claims are ours for their time; after that they may be another's.
        By our own clock, counted from when we asked: sooner than etcd gives them away."""
        if self._taken:
            return Announced(f"{UNTOLD}, and no pods are added: {self._taken}", fenced=True)
        if self._held_until is None or self._clock() < self._held_until:
            return Announced(f"{UNTOLD}: {self._error}")
        hold = f"{self._terms.hold_seconds} s (discovery.hold_seconds)"
        why = f"after {hold} its prefixes may be another's: {self._error}"
        return Announced(f"{UNTOLD}, and no pods are added: {why}", fenced=True)

    def _lease_left(self) -> float:
        """Seconds until the others forget us, by our own clock, counted from when we asked: never more than
        by etcd's. Endless if they have."""
        if self._leases is None:
            return math.inf
        return self._leases.renewed_at + self._terms.lease_seconds - self._clock()

    async def _renew(self) -> None:
        """Renew what is due; no leases are left if they were lost."""
        leases, now = self._leases, self._clock()
        assert leases is not None  # noqa: S101 (registered)
        alive = not self._lost.is_set()
        if alive and now - leases.renewed_at >= self._terms.lease_seconds / RENEWALS_A_LEASE:
            alive = await self._client.keep_alive(leases.record)
            leases = replace(leases, renewed_at=now)
        if alive and now - leases.held_at >= self._terms.hold_seconds / RENEWALS_A_LEASE:
            alive = await self._client.keep_alive(leases.hold)
            leases = replace(leases, held_at=now)
            if alive:
                self._held_until = now + self._terms.hold_seconds
        self._leases = leases if alive else None

    async def _pause(self) -> None:
        """Until the next renewal is due, or the record is seen to be lost."""
        seconds = min(self._terms.lease_seconds, self._terms.hold_seconds) / RENEWALS_A_LEASE
        waiting = {asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(self._lost.wait())}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in waiting:
                future.cancel()


def claim_key(root: str, prefix: Network) -> str:
    """A key holds no second slash, so that one more level can be added some day."""
    return f"{root}{CLAIMS}{prefix.network_address}-{prefix.prefixlen}"


def claimed(root: str, key: str) -> Network | None:
    """The prefix that a claim's key names; None if it is no claim."""
    address, _, length = key.removeprefix(f"{root}{CLAIMS}").rpartition("-")
    try:
        return ip_network(f"{address}/{length}")
    except ValueError:
        return None


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def endpoints_of(value: bytes) -> set[str]:
    """The endpoints in a record's value; none if it is no record."""
    try:
        return set(map(str, json.loads(value)["endpoints"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
