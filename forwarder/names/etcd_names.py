"""Follows the names in an etcd cluster for the resolver."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from forwarder.addresses import Network
from forwarder.discovery.etcd_client import EtcdClient, KeyValue
from forwarder.discovery.etcd_follow import (
    SILENCE_SECONDS,
    Changed,
    HeardAgain,
    Listed,
    Unheard,
    Word,
    follow,
)
from forwarder.faults import ConfigError
from forwarder.names.etcd import (
    PODS,
    PODS_SOURCE,
    SERVICES,
    SERVICES_SOURCE,
    read_pods_value,
    read_service_value,
    service_key,
)
from forwarder.names.etcd_publisher import PodPublisher
from forwarder.names.records import Change, Pod, Put, Remove, Replace, Service

log = logging.getLogger("podloom.names")


class EtcdNames:
    """`tell` gets a source's name and a change of it. The last good state stays while etcd is away."""

    def __init__(
        self,
        client: EtcdClient,
        root: str,
        domain: str,
        networks: Sequence[Network],
        publisher: PodPublisher,
        tell: Callable[[str, Change], None],
        *,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`root` is what all keys begin with, with its final slash; `networks` are the cluster's."""
        self._client = client
        self._root = root
        self._domain = domain
        self._networks = tuple(networks)
        self._publisher = publisher
        self._tell = tell
        self._silence_seconds = silence_seconds
        self._clock, self._sleep = clock, sleep
        self._nodes: set[str] = set()
        self._refused: dict[str, str] = {}
        self._said = ""

    async def run(self) -> None:
        """Follow both, and put this node's pods, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_services())
            tasks.create_task(self._follow_pods())
            tasks.create_task(self._publisher.run())

    def _words(self, below: str) -> AsyncGenerator[Word, None]:
        return follow(
            self._client,
            self._root + below,
            silence_seconds=self._silence_seconds,
            clock=self._clock,
            sleep=self._sleep,
        )

    async def _follow_services(self) -> None:
        async with aclosing(self._words(SERVICES)) as words:
            async for word in words:
                match word:
                    case Listed(found):
                        # In a thread: ten thousand of them are a second of parsing.
                        read = await asyncio.to_thread(list, map(self._service, found))
                        services = tuple(service for service in read if service is not None)
                        self._tell(SERVICES_SOURCE, Replace(services))
                    case Changed(KeyValue() as item):
                        if (service := self._service(item)) is not None:
                            self._tell(SERVICES_SOURCE, Put((service,)))
                    case Changed(gone):
                        if (key := service_key(self._forget(gone.key))) is not None:
                            self._tell(SERVICES_SOURCE, Remove((key,)))
                    case _:
                        self._hear(word)

    def _service(self, item: KeyValue) -> Service | None:
        name = item.key.removeprefix(self._root)
        try:
            service = read_service_value(name, item.value, self._domain)
        except ConfigError as error:
            self._judge(name, str(error.faults[0]))
            return None
        self._judge(name, "")
        return service

    async def _follow_pods(self) -> None:
        async with aclosing(self._words(PODS)) as words:
            async for word in words:
                match word:
                    case Listed(found):
                        self._tell_all_pods(await asyncio.to_thread(self._all_pods, found))
                        self._publisher.see(next(filter(self._is_own, found), None))
                    case Changed(change) if self._is_own(change):
                        self._publisher.see(change if isinstance(change, KeyValue) else None)
                    case Changed(KeyValue() as item):
                        self._tell_pods(self._node_of(item.key), self._pods(item))
                    case Changed(gone):
                        self._tell_pods(self._node_of(self._root + self._forget(gone.key)), ())
                    case _:
                        self._hear(word)

    def _all_pods(self, found: Iterable[KeyValue]) -> dict[str, tuple[Pod, ...] | None]:
        return {self._node_of(item.key): self._pods(item) for item in found}

    def _tell_all_pods(self, read: Mapping[str, tuple[Pod, ...] | None]) -> None:
        for node in self._nodes - read.keys():
            self._tell_pods(node, ())
        for node, pods in read.items():
            self._tell_pods(node, pods)
        self._tell(PODS_SOURCE, Replace(()))

    def _pods(self, item: KeyValue) -> tuple[Pod, ...] | None:
        """None if what was known of that node's pods is to stay."""
        name = item.key.removeprefix(self._root)
        try:
            pods, faults = read_pods_value(name, item.value, self._domain, self._networks)
        except ConfigError as error:
            self._judge(name, str(error.faults[0]))
            return None
        self._judge(name, "; ".join(map(str, faults[:3])))
        return pods

    def _tell_pods(self, node: str, pods: tuple[Pod, ...] | None) -> None:
        """Of this node the CNI store says more, and sooner."""
        if pods is None or node == self._publisher.node_id:
            return
        if pods:
            self._nodes.add(node)
        else:
            self._nodes.discard(node)
        self._tell(f"{PODS_SOURCE} of {node}", Replace(pods))

    def _node_of(self, key: str) -> str:
        return key.removeprefix(self._root + PODS)

    def _is_own(self, item: Any) -> bool:
        return bool(self._node_of(item.key) == self._publisher.node_id)

    # What is wrong

    def _judge(self, name: str, reason: str) -> None:
        """Say of a key what is wrong with it, if that is news."""
        if reason and self._refused.get(name) != reason:
            log.error("a name in etcd is refused: %s", reason)
        if reason:
            self._refused[name] = reason
        else:
            self._refused.pop(name, None)

    def _forget(self, key: str) -> str:
        """A key that is gone, without what all keys begin with."""
        name = key.removeprefix(self._root)
        self._refused.pop(name, None)
        return name

    def _hear(self, word: Word) -> None:
        match word:
            case Unheard(fault) if fault != self._said:
                self._said = fault
                log.error("names are not up to date: %s", fault)
            case HeardAgain():
                self._said = ""
