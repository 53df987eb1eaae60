"""What survives a crash: which attachment holds which addresses. SQLite, every reservation fsync'd.

The daemon and, while it is away, the plugin itself open the same file; SQLite's locks keep them apart.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cni.ipam import IpAddress, Pool, RangeSet, choose
from cni.netconf import QUARANTINE_S
from cni.request import Attachment

FILE_NAME = "cni.sqlite3"

_SCHEMA_VERSION = 2
_LOCK_TIMEOUT_S = 10.0

_SINCE_2 = (
    "CREATE INDEX addresses_at_rest ON addresses (rests_until) WHERE rests_until IS NOT NULL",
    "CREATE TABLE boot (boot_id TEXT NOT NULL PRIMARY KEY) WITHOUT ROWID",  # a row: the last that opened it
)
# mac is null unless it was asked for: those we choose follow from the address.
# attached_at is null until the ADD is finished, so that a killed one can be told from a live pod.
# rests_until is null while the address is held. boot_id: a pod never outlives the boot it was attached in.
_SCHEMA = (
    """CREATE TABLE attachments (
        network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
        host_ifname TEXT NOT NULL, bridge TEXT NOT NULL, boot_id TEXT NOT NULL,
        pod_namespace TEXT NOT NULL, pod_name TEXT NOT NULL,
        mac TEXT UNIQUE, reserved_at REAL NOT NULL, attached_at REAL, aliases TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (network, container, ifname)
    ) WITHOUT ROWID""",
    """CREATE TABLE addresses (
        family INTEGER NOT NULL, address BLOB NOT NULL, gateway BLOB NOT NULL,
        network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
        rests_until REAL,
        PRIMARY KEY (family, address)
    ) WITHOUT ROWID""",
    "CREATE INDEX addresses_of_attachment ON addresses (network, container, ifname)",
    *_SINCE_2,
    "CREATE TABLE last_given (pool TEXT NOT NULL PRIMARY KEY, address BLOB NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
# What makes a store of the version before the next one.
_UPGRADES = {
    1: (
        "ALTER TABLE attachments ADD COLUMN aliases TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE addresses RENAME COLUMN released_at TO rests_until",
        *_SINCE_2,
        "PRAGMA user_version = 2",
    ),
}


class StoreError(Exception):
    """The store cannot be used; the text says which file and why."""


class PoolExhaustedError(Exception):
    """Every address of a pool is held; the text names the pool."""


class AddressTakenError(Exception):
    """An address or MAC that was asked for is another attachment's; the text names both."""


class AddressNotOursError(Exception):
    """An address was asked for that no pool may give; the text names it and the pools."""


@dataclass(frozen=True)
class Lease:
    """One address held by an attachment, and the gateway that goes with it."""

    address: IpAddress
    gateway: IpAddress


@dataclass(frozen=True)
class Holder:
    """Who an ADD is for. `mac` only when it was asked for: no two attachments may have the same.

    `aliases` are more names for the pod; none has a space in it.
    """

    host_ifname: str
    bridge: str
    pod_namespace: str = ""
    pod_name: str = ""
    mac: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What is kept of one attachment. `attached_at` is None while its ADD is unfinished."""

    attachment: Attachment
    host_ifname: str
    bridge: str
    pod_namespace: str
    pod_name: str
    reserved_at: float
    attached_at: float | None
    leases: tuple[Lease, ...]
    aliases: tuple[str, ...] = ()


class Store:
    """One connection, for any thread. Times are seconds of a clock that starts anew with each boot.

    Threads take turns by a lock of ours: SQLite's own makes a waiter sleep, up to 100 ms at a time.
    """

    def __init__(self, state_dir: Path, boot_id: str, now: float) -> None:
        self._path = state_dir / FILE_NAME
        self._boot_id = boot_id
        self._turn = threading.RLock()
        with self._reported():
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(
                self._path, timeout=_LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._reported():
                self._prepare(now)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        with self._turn:
            self._database.close()

    def reserve(
        self,
        attachment: Attachment,
        holder: Holder,
        range_sets: Sequence[RangeSet],
        now: float,
        requested: Sequence[IpAddress] = (),
    ) -> tuple[Lease, ...]:
        """One address of each range set, or those of `requested` that it has; on disk before this returns.

        The attachment must not have a record. A requested address may be one at rest.
        """
        with self._transaction():
            self._insert(attachment, holder, now)
            leases = []
            for range_set in range_sets:
                asked = _asked_of(range_set, requested)
                leases += asked or [self._next_lease(range_set, now)]
            for address in requested:
                if address not in {lease.address for lease in leases}:
                    pools = ", ".join(str(pool) for range_set in range_sets for pool in range_set)
                    raise AddressNotOursError(f"{address} was asked for; this node gives {pools}")
            self._hold(attachment, leases)
        return tuple(leases)

    def adopt(self, attachment: Attachment, holder: Holder, now: float) -> None:
        """Make a record without addresses: `hold` adds those that an IPAM plugin gave."""
        with self._transaction():
            self._insert(attachment, holder, now)

    def hold(self, attachment: Attachment, leases: Sequence[Lease]) -> None:
        with self._transaction():
            self._hold(attachment, leases)

    def exhausted(self, range_sets: Sequence[RangeSet], now: float) -> str:
        """Which range set has no address left to give, in words; empty while all have."""
        with self._reported():
            for range_set in range_sets:
                if self._choose(range_set, now) is None:
                    return _no_address_left(range_set)
        return ""

    def complete(self, attachment: Attachment, now: float) -> None:
        """Mark the ADD as finished. Not fsync'd: losing it takes a power cut, and no pod outlives that."""
        with self._reported():
            self._run("PRAGMA synchronous = NORMAL")
            try:
                done = self._run(
                    "UPDATE attachments SET attached_at = ? WHERE (network, container, ifname) = (?, ?, ?)",
                    (now, *_key(attachment)),
                )
            finally:
                self._run("PRAGMA synchronous = FULL")
        if done.rowcount != 1:
            raise StoreError(f"{self._path}: a DEL of the same attachment came in between")

    def find(self, attachment: Attachment) -> Record | None:
        key = _key(attachment)
        with self._reported():
            row = self._one(
                "SELECT host_ifname, bridge, pod_namespace, pod_name, reserved_at, attached_at, aliases"
                " FROM attachments WHERE (network, container, ifname) = (?, ?, ?)",
                key,
            )
            if row is None:
                return None
            rows = self._run(
                "SELECT address, gateway FROM addresses WHERE (network, container, ifname) = (?, ?, ?)"
                " AND rests_until IS NULL ORDER BY family, address",
                key,
            )
            leases = tuple(Lease(ip_address(own), ip_address(gateway)) for own, gateway in rows)
            host_ifname, bridge, pod_namespace, pod_name, reserved_at, attached_at, aliases = row
            return Record(
                attachment=attachment,
                host_ifname=host_ifname,
                bridge=bridge,
                pod_namespace=pod_namespace,
                pod_name=pod_name,
                reserved_at=reserved_at,
                attached_at=attached_at,
                leases=leases,
                aliases=tuple(aliases.split()),
            )

    def records(self, network: str | None = None) -> list[Record]:
        """Every record, or those of one network; by network, container and interface."""
        with self._reported():
            keys = self._run(
                "SELECT network, container, ifname FROM attachments WHERE network = ?1 OR ?1 IS NULL"
                " ORDER BY network, container, ifname",
                (network,),
            ).fetchall()
            found = (self.find(Attachment(*key)) for key in keys)
            return [record for record in found if record is not None]

    def release(self, attachment: Attachment, now: float, rest_s: float = QUARANTINE_S) -> None:
        """Give its addresses back, to rest for `rest_s`. Nothing to do when it has no record."""
        key = _key(attachment)
        with self._transaction():
            self._run("DELETE FROM addresses WHERE rests_until <= ?", (now,))
            self._run(
                "UPDATE addresses SET rests_until = ?"
                " WHERE (network, container, ifname) = (?, ?, ?) AND rests_until IS NULL",
                (now + rest_s, *key),
            )
            self._run("DELETE FROM attachments WHERE (network, container, ifname) = (?, ?, ?)", key)

    def _prepare(self, now: float) -> None:
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = FULL")
        if self._schema_version() != _SCHEMA_VERSION:
            with self._transaction():
                self._make_or_upgrade()
        self._release_earlier_boots(now)

    def _make_or_upgrade(self) -> None:
        version = self._schema_version()  # another process may have been quicker
        if version > _SCHEMA_VERSION:
            raise StoreError(f"{self._path} has schema {version}; this podloom knows up to {_SCHEMA_VERSION}")
        for statement in _SCHEMA if version == 0 else ():
            self._run(statement)
        for older in range(version or _SCHEMA_VERSION, _SCHEMA_VERSION):
            for statement in _UPGRADES[older]:
                self._run(statement)

    def _release_earlier_boots(self, now: float) -> None:
        """After a reboot no pod is left, whether or not its DEL ever comes, and the clock is another."""
        if self._one("SELECT 1 FROM boot WHERE boot_id = ?", (self._boot_id,)):
            return
        with self._transaction():
            self._run(
                "UPDATE addresses SET rests_until = ? WHERE rests_until IS NOT NULL"
                " OR (network, container, ifname) IN"
                " (SELECT network, container, ifname FROM attachments WHERE boot_id != ?)",
                (now + QUARANTINE_S, self._boot_id),
            )
            self._run("DELETE FROM attachments WHERE boot_id != ?", (self._boot_id,))
            # What is left was written by version 1, which told the time by another clock.
            self._run(
                "UPDATE attachments SET reserved_at = ?1, attached_at = min(attached_at, ?1)"
                " WHERE reserved_at > ?1",
                (now,),
            )
            self._run("DELETE FROM boot")
            self._run("INSERT INTO boot VALUES (?)", (self._boot_id,))

    def _insert(self, attachment: Attachment, holder: Holder, now: float) -> None:
        if holder.mac:
            other = self._one(
                "SELECT network, container, ifname FROM attachments WHERE mac = ?", (holder.mac,)
            )
            if other is not None:
                raise AddressTakenError(f"{holder.mac} is held by {'/'.join(other)}")
        self._run(
            "INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)",
            (
                *_key(attachment),
                holder.host_ifname,
                holder.bridge,
                self._boot_id,
                holder.pod_namespace,
                holder.pod_name,
                holder.mac or None,
                now,
                " ".join(holder.aliases),
            ),
        )

    def _hold(self, attachment: Attachment, leases: Sequence[Lease]) -> None:
        for lease in leases:
            address = (lease.address.version, lease.address.packed)
            other = self._one(
                "SELECT network, container, ifname FROM addresses"
                " WHERE family = ? AND address = ? AND rests_until IS NULL",
                address,
            )
            if other is not None:
                raise AddressTakenError(f"{lease.address} is held by {'/'.join(other)}")
            self._run(
                "INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?, ?, ?, NULL)",
                (*address, lease.gateway.packed, *_key(attachment)),
            )

    def _next_lease(self, range_set: RangeSet, now: float) -> Lease:
        chosen = self._choose(range_set, now)
        if chosen is None:
            raise PoolExhaustedError(_no_address_left(range_set))
        pool, address = chosen
        self._run("INSERT OR REPLACE INTO last_given VALUES (?, ?)", (str(pool), address.packed))
        return Lease(address, pool.gateway)

    def _choose(self, range_set: RangeSet, now: float) -> tuple[Pool, IpAddress] | None:
        """The next address; one at rest only when no pool of the set has another."""
        for pool in range_set:
            last = self._one("SELECT address FROM last_given WHERE pool = ?", (str(pool),))
            address = choose(pool, ip_address(last[0]) if last else None, partial(self._taken, now, pool))
            if address is not None:
                return pool, address
        for pool in range_set:
            resting = self._run(
                "SELECT address FROM addresses WHERE family = ? AND address BETWEEN ? AND ?"
                " AND rests_until IS NOT NULL ORDER BY rests_until",
                (pool.low.version, pool.low.packed, pool.high.packed),
            )
            for row in resting:
                if pool.may_give(ip_address(row[0])):
                    return pool, ip_address(row[0])
        return None

    def _taken(self, now: float, pool: Pool, first: int, end: int) -> Iterable[int]:
        width = len(pool.low.packed)
        rows = self._run(
            "SELECT address FROM addresses WHERE family = ? AND address BETWEEN ? AND ?"
            " AND (rests_until IS NULL OR rests_until > ?) ORDER BY address",
            (pool.low.version, first.to_bytes(width, "big"), end.to_bytes(width, "big"), now),
        )
        return (int.from_bytes(row[0], "big") for row in rows)

    def _schema_version(self) -> int:
        return int(self._one("PRAGMA user_version")[0])

    def _run(self, statement: str, values: Sequence[str | bytes | float | None] = ()) -> sqlite3.Cursor:
        return self._database.execute(statement, values)

    def _one(self, statement: str, values: Sequence[str | bytes | float | None] = ()) -> Any:
        """The first row, or None."""
        return self._run(statement, values).fetchone()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reported():
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._database.in_transaction:
                    self._run("ROLLBACK")
                raise

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            with self._turn:
                yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self._path}: {error}") from error


def _asked_of(range_set: RangeSet, requested: Sequence[IpAddress]) -> list[Lease]:
    return [
        Lease(address, pool.gateway)
        for address in requested
        for pool in [next((pool for pool in range_set if pool.may_give(address)), None)]
        if pool is not None
    ]


def _no_address_left(range_set: RangeSet) -> str:
    return f"no address left in {', '.join(map(str, range_set))}"


def _key(attachment: Attachment) -> tuple[str, str, str]:
    return attachment.network, attachment.container, attachment.ifname
