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
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cni.ipam import IpAddress, Pool, choose
from cni.request import Attachment

FILE_NAME = "cni.sqlite3"
QUARANTINE_S = 60.0
"""How long a released address rests while another is free: caches elsewhere may still name its last pod."""

_SCHEMA_VERSION = 1
_LOCK_TIMEOUT_S = 10.0

# attached_at is null until the ADD is finished, so that a killed one can be told from a live pod.
# released_at is null while the address is held. boot_id: a pod never outlives the boot it was attached in.
_SCHEMA = (
    """CREATE TABLE attachments (
        network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
        host_ifname TEXT NOT NULL, bridge TEXT NOT NULL, boot_id TEXT NOT NULL,
        pod_namespace TEXT NOT NULL, pod_name TEXT NOT NULL,
        reserved_at REAL NOT NULL, attached_at REAL,
        PRIMARY KEY (network, container, ifname)
    ) WITHOUT ROWID""",
    """CREATE TABLE addresses (
        family INTEGER NOT NULL, address BLOB NOT NULL, gateway BLOB NOT NULL,
        network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
        released_at REAL,
        PRIMARY KEY (family, address)
    ) WITHOUT ROWID""",
    "CREATE INDEX addresses_of_attachment ON addresses (network, container, ifname)",
    "CREATE TABLE last_given (pool TEXT NOT NULL PRIMARY KEY, address BLOB NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)


class StoreError(Exception):
    """The store cannot be used; the text says which file and why."""


class PoolExhaustedError(Exception):
    """Every address of a pool is held; the text names the pool."""


@dataclass(frozen=True)
class Lease:
    """One address held by an attachment, and the gateway that goes with it."""

    address: IpAddress
    gateway: IpAddress


@dataclass(frozen=True)
class Record:
    """What is kept of one attachment. `attached_at` is None while its ADD is unfinished."""

    attachment: Attachment
    host_ifname: str
    bridge: str
    pod_namespace: str
    pod_name: str
    attached_at: float | None
    leases: tuple[Lease, ...]


class Store:
    """One connection, for any thread. Times are seconds since the epoch.

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
        host_ifname: str,
        bridge: str,
        pools: Sequence[Pool],
        now: float,
        pod: tuple[str, str] = ("", ""),
    ) -> tuple[Lease, ...]:
        """One address of each pool, on disk before this returns. `pod` is its namespace and name.

        The attachment must not have a record.
        """
        key = _key(attachment)
        with self._transaction():
            self._run(
                "INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (*key, host_ifname, bridge, self._boot_id, *pod, now),
            )
            leases = tuple(Lease(self._next_address(pool, now), pool.gateway) for pool in pools)
            for lease in leases:
                self._run(
                    "INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?, ?, ?, NULL)",
                    (lease.address.version, lease.address.packed, lease.gateway.packed, *key),
                )
        return leases

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
                "SELECT host_ifname, bridge, pod_namespace, pod_name, attached_at"
                " FROM attachments WHERE (network, container, ifname) = (?, ?, ?)",
                key,
            )
            if row is None:
                return None
            rows = self._run(
                "SELECT address, gateway FROM addresses WHERE (network, container, ifname) = (?, ?, ?)"
                " AND released_at IS NULL ORDER BY family, address",
                key,
            )
            host_ifname, bridge, pod_namespace, pod_name, attached_at = row
            leases = tuple(Lease(ip_address(own), ip_address(gateway)) for own, gateway in rows)
            return Record(attachment, host_ifname, bridge, pod_namespace, pod_name, attached_at, leases)

    def release(self, attachment: Attachment, now: float) -> None:
        """Give its addresses back, into quarantine. Nothing to do when it has no record."""
        key = _key(attachment)
        with self._transaction():
            self._run(
                "UPDATE addresses SET released_at = ?"
                " WHERE (network, container, ifname) = (?, ?, ?) AND released_at IS NULL",
                (now, *key),
            )
            self._run("DELETE FROM attachments WHERE (network, container, ifname) = (?, ?, ?)", key)

    def forget(self, attachment: Attachment) -> None:
        """Undo `reserve`: no pod ever used these addresses, so they need no quarantine."""
        key = _key(attachment)
        with self._transaction():
            self._run(
                "DELETE FROM addresses"
                " WHERE (network, container, ifname) = (?, ?, ?) AND released_at IS NULL",
                key,
            )
            self._run("DELETE FROM attachments WHERE (network, container, ifname) = (?, ?, ?)", key)

    def _prepare(self, now: float) -> None:
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = FULL")
        if self._schema_version() != _SCHEMA_VERSION:
            with self._transaction():
                version = self._schema_version()  # another process may have been quicker
                if version == 0:
                    for statement in _SCHEMA:
                        self._run(statement)
                elif version != _SCHEMA_VERSION:
                    raise StoreError(
                        f"{self._path} has schema {version}; this podloom knows up to {_SCHEMA_VERSION}"
                    )
        self._release_earlier_boots(now)

    def _release_earlier_boots(self, now: float) -> None:
        """After a reboot no pod is left, whether or not its DEL ever comes."""
        if not self._one("SELECT 1 FROM attachments WHERE boot_id != ?", (self._boot_id,)):
            return
        with self._transaction():
            self._run(
                "UPDATE addresses SET released_at = ? WHERE released_at IS NULL"
                " AND (network, container, ifname) IN"
                " (SELECT network, container, ifname FROM attachments WHERE boot_id != ?)",
                (now, self._boot_id),
            )
            self._run("DELETE FROM attachments WHERE boot_id != ?", (self._boot_id,))

    def _next_address(self, pool: Pool, now: float) -> IpAddress:
        family, low, high = pool.low.version, pool.low.packed, pool.high.packed
        resting_since = now - QUARANTINE_S

        def taken_within(first: int, end: int) -> Iterable[int]:
            width = len(low)
            rows = self._run(
                "SELECT address FROM addresses WHERE family = ? AND address BETWEEN ? AND ?"
                " AND (released_at IS NULL OR released_at > ?) ORDER BY address",
                (family, first.to_bytes(width, "big"), end.to_bytes(width, "big"), resting_since),
            )
            return (int.from_bytes(row[0], "big") for row in rows)

        last = self._one("SELECT address FROM last_given WHERE pool = ?", (str(pool),))
        address = choose(pool, ip_address(last[0]) if last else None, taken_within)
        if address is None:
            longest_at_rest = self._one(
                "SELECT address FROM addresses WHERE family = ? AND address BETWEEN ? AND ?"
                " AND released_at IS NOT NULL ORDER BY released_at LIMIT 1",
                (family, low, high),
            )
            if longest_at_rest is None:
                raise PoolExhaustedError(f"no address left in {pool}")
            address = ip_address(longest_at_rest[0])
        self._run("INSERT OR REPLACE INTO last_given VALUES (?, ?)", (str(pool), address.packed))
        return address

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


def _key(attachment: Attachment) -> tuple[str, str, str]:
    return attachment.network, attachment.container, attachment.ifname
