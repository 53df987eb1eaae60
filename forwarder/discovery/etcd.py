"""Peers from an etcd cluster in which every node registers itself (`registration`)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

from forwarder.addresses import Network
from forwarder.boot_clock import boot_seconds
from forwarder.config import Config, DiscoveryConfig, own_record, read_record, read_text
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Trouble, Upsert
from forwarder.discovery.backoff import Backoff
from forwarder.discovery.etcd_client import Deleted, EtcdClient, EtcdError, KeyValue
from forwarder.discovery.etcd_follow import (
    SILENCE_SECONDS,
    Changed,
    HeardAgain,
    Listed,
    Unheard,
    Word,
    follow,
)
from forwarder.discovery.http import tls_context
from forwarder.discovery.registration import NODES, ClaimError, Pools, Registration, Terms
from forwarder.discovery.static import main_file_peers
from forwarder.faults import ConfigError, Fault
from forwarder.registry import Refusal, Said

log = logging.getLogger("podloom")

PATIENCE_SECONDS: Final = 3.0
"""How long a start waits for etcd when the prefixes of last time are known."""


class EtcdSource:
    """Registers this node and follows the records of the others."""

    def __init__(
        self,
        config: Config,
        stored_prefixes: tuple[Network, ...] = (),
        *,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Callable[[], float] = boot_seconds,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`stored_prefixes` are those this node had when it ran last. ConfigError if a file that the
        configuration names cannot be used."""
        discovery = config.discovery
        self._config = config
        self._root = root_of(discovery)
        self._stored_prefixes = stored_prefixes
        self._silence_seconds = silence_seconds
        self._clock, self._sleep = clock, sleep
        self._client = open_client(discovery)
        self._registration = Registration(
            self._client,
            self._root,
            own_record(config),
            Pools(config.cluster.cidrs, {version: discovery.prefix_length(version) for version in (4, 6)}),
            Terms(discovery.lease_seconds, discovery.hold_seconds),
            wished=stored_prefixes,
            clock=clock,
            sleep=sleep,
        )
        self._items: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self._announced: Announced | None = None

    async def own_prefixes(self) -> tuple[Network, ...]:
        """What the configuration gives, or what this node has claimed. Waits until etcd answers and a prefix
        is free, unless it is known what this node had before."""
        if self._config.node.prefixes:
            return self._config.node.prefixes
        backoff, began, said = Backoff(), self._clock(), ""
        while True:
            try:
                await self._registration.register()
                return self._registration.prefixes
            except (EtcdError, ClaimError) as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("waiting for a prefix: %s", said)
                if (
                    isinstance(error, EtcdError)
                    and self._stored_prefixes
                    and self._clock() - began >= PATIENCE_SECONDS
                ):
                    self._registration.insist(self._stored_prefixes)
                    return self._stored_prefixes
            await self._sleep(backoff.next())

    def _say_once(self, announced: Announced) -> None:
        if self._announced != announced:
            self._announced = announced
            self._items.put_nowait(announced)

    async def watch(self) -> AsyncIterator[Item]:
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._registration.keep(self._say_once),
                self._registration.guard(self._say_once),
                self._follow(),
            )
        ]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            while True:
                item = await self._items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def relocate(self, config: Config) -> None:
        self._config = config
        self._registration.relocate(config.node.endpoints)
        self._client.reconnect()

    async def close(self) -> None:
        await self._client.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._items.put_nowait(error)

    async def _follow(self) -> None:
        words = follow(
            self._client,
            self._root + NODES,
            silence_seconds=self._silence_seconds,
            clock=self._clock,
            sleep=self._sleep,
        )
        async with aclosing(words):
            async for word in words:
                await self._take(word)
                del word  # It may be a hundred thousand records, and the next may come in a year.

    async def _take(self, word: Word) -> None:
        match word:
            case Listed(found):
                await self._say_all(found)
            case Changed(change):
                self._say(change)
            case Unheard(fault):
                self._items.put_nowait(Trouble((fault,)))
            case HeardAgain():
                self._items.put_nowait(Current())

    async def _say_all(self, found: tuple[KeyValue, ...]) -> None:
        own = self._registration.key
        if not any(self._registration.is_ours(item) for item in found if item.key == own):
            self._registration.recheck()
        others = [item for item in found if item.key != own]
        # In a thread: ten thousand records are a second of parsing.
        said = await asyncio.to_thread(read_all, self._root, others)
        self._items.put_nowait(Snapshot({**main_file_peers(self._config), **said}))

    def _say(self, change: KeyValue | Deleted) -> None:
        if change.key == self._registration.key:
            if not self._registration.is_ours(change):
                self._registration.recheck()
        elif isinstance(change, Deleted):
            self._items.put_nowait(Remove(name_of(self._root, change.key)))
        else:
            name = name_of(self._root, change.key)
            self._items.put_nowait(Upsert(name, read_value(name, change.value)))


def root_of(discovery: DiscoveryConfig) -> str:
    """What all keys of the cluster begin with."""
    return f"{discovery.key_prefix.rstrip('/')}/"


def open_client(discovery: DiscoveryConfig) -> EtcdClient:
    """ConfigError if a file it names cannot be used."""
    secure = any(url.startswith("https:") for url in discovery.urls)
    files = discovery.ca_file, discovery.cert_file, discovery.key_file
    return EtcdClient(
        discovery.urls,
        tls=tls_context(*files) if secure else None,
        username=discovery.username,
        password="" if discovery.password_file is None else read_text(discovery.password_file).strip(),
    )


def read_all(root: str, found: Iterable[KeyValue]) -> dict[str, Said]:
    names = ((name_of(root, item.key), item.value) for item in found)
    return {name: read_value(name, value) for name, value in names}


def name_of(root: str, key: str) -> str:
    """What a key is called in faults: without what all keys begin with, and printable."""
    return key.removeprefix(root).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_value(name: str, value: bytes) -> Said:
    """The record that stands under a key's name, which must be the node's."""
    try:
        table = json.loads(value)
    except (ValueError, RecursionError) as error:
        return Refusal((Fault(name, value[:40].decode("utf-8", "replace"), f"must be JSON: {error}"),))
    if not isinstance(table, dict):
        return Refusal((Fault(name, table, "must be a JSON object"),))
    try:
        record = read_record(table, name)
    except ConfigError as error:
        return Refusal(error.faults)
    if name != NODES + record.id:
        return Refusal((Fault(f"{name}.id", record.id, "must be the key's own"),))
    return record
