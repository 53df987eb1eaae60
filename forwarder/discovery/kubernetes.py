"""Peers from a Kubernetes cluster's Node objects, which the node annotates for itself."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any, Final

from forwarder.addresses import Network
from forwarder.config import Config, own_record
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Trouble, Upsert
from forwarder.discovery.backoff import Backoff
from forwarder.discovery.kube_client import (
    GoneError,
    KubeClient,
    KubeError,
    access_by,
)
from forwarder.discovery.kube_nodes import (
    annotations_of,
    name_of,
    network_unavailable,
    other_machine,
    pod_cidrs,
    read_flannel,
    read_ours,
    write_flannel,
    write_ours,
)
from forwarder.discovery.static import main_file_peers
from forwarder.garbage import many_objects
from forwarder.registry import Said

log = logging.getLogger("podloom")

WATCH_SECONDS: Final = 45
"""A watch is asked for so long: one that a firewall has forgotten is silent for no longer."""

HASTY_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 3.0
"""How long a start waits for the API server when the prefixes of last time are known."""


class KubernetesSource:
    """Annotates this Node and follows the others."""

    def __init__(
        self,
        config: Config,
        stored_prefixes: tuple[Network, ...] = (),
        *,
        watch_seconds: int = WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`stored_prefixes` are those this node had when it ran last. ConfigError if the kubeconfig or the
        service account cannot be used."""
        discovery = config.discovery
        self._config = config
        self._stored_prefixes = stored_prefixes
        self._watch_seconds = watch_seconds
        self._clock, self._sleep = clock, sleep
        self._client = KubeClient(access_by(discovery.kubeconfig))
        self._name = discovery.node_name or os.environ.get("NODE_NAME") or socket.gethostname().lower()
        self._flannel = discovery.compat == "flannel"
        self._record = own_record(config)
        self._keys: dict[str, tuple[str, ...]] = {}
        self._own: Mapping[str, Any] | None = None
        self._own_changed = asyncio.Event()
        self._items: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self._announced: Announced | None = None
        self._was_announced = False
        self._left: set[str] = set()

    async def own_prefixes(self) -> tuple[Network, ...]:
        """What the configuration gives, or the Node's podCIDRs. Waits until there are some, unless it is
        known what this node had before."""
        if self._config.node.prefixes:
            return self._config.node.prefixes
        backoff, began, said = Backoff(), self._clock(), ""
        while True:
            try:
                self._own = await self._client.node(self._name)
                prefixes = tuple(ip_network(cidr) for cidr in pod_cidrs(self._own))
                reason = f"Node {self._name} has no podCIDRs: does the controller manager allocate them?"
            except (KubeError, GoneError, ValueError) as error:
                prefixes, reason = (), str(error)
                if self._stored_prefixes and self._clock() - began >= PATIENCE_SECONDS:
                    prefixes = self._stored_prefixes
            if prefixes:
                self._record = replace(self._record, prefixes=prefixes)
                return prefixes
            if reason != said:
                said = reason
                log.warning("waiting for a prefix: %s", said)
            await self._sleep(backoff.next())

    async def watch(self) -> AsyncIterator[Item]:
        tasks = [asyncio.create_task(work) for work in (self._keep_announced(), self._follow())]
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
        self._left |= set(map(str, self._record.endpoints))
        self._record = replace(self._record, endpoints=config.node.endpoints)
        self._own_changed.set()
        self._client.reconnect()

    async def close(self) -> None:
        await self._client.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._items.put_nowait(error)

    # This node

    async def _keep_announced(self) -> None:
        """Put our annotations there, again whenever they are seen to be gone or changed."""
        backoff = Backoff()
        while True:
            await self._own_changed.wait()
            self._own_changed.clear()
            try:
                announced = await self._announce()
            except (KubeError, GoneError) as error:
                announced = Announced(f"the others are not told of this node: Node {self._name}: {error}")
                self._own_changed.set()
            if self._announced != announced:
                self._announced = announced
                self._items.put_nowait(announced)
            # Also after success: somebody may undo it as fast as we do it.
            await self._sleep(backoff.next())
            if not self._own_changed.is_set():
                backoff.reset()

    async def _announce(self) -> Announced:
        if self._own is None:
            return Announced(f"the others are not told of this node: there is no Node {self._name}")
        ours = self._left | set(map(str, self._record.endpoints))
        others = other_machine(self._own, ours, announced=self._was_announced)
        if others and not self._flannel:
            # Who is written there has the Node's podCIDRs; to write over each other for ever helps nobody.
            return Announced(
                f"the others are not told of this node, and no pods are added: {others} is Node {self._name} "
                "too: give this machine a name of its own, or restart podloom here if that one is gone",
                fenced=True,
            )
        patch: dict[str, Any] = {}
        annotations = annotations_of(self._own)
        wanted = write_flannel(self._record, annotations) if self._flannel else write_ours(self._record)
        if not wanted.items() <= annotations.items():
            patch["metadata"] = {"annotations": wanted}
        if network_unavailable(self._own):
            patch["status"] = {"conditions": [_network_available()]}
        if patch:
            await self._client.patch_status(self._name, patch)
        self._was_announced = True
        return Announced(None)

    # The others

    async def _follow(self) -> None:
        """List, then watch from there on; again from where it was when the watch ends."""
        backoff = Backoff()
        version: str | None = None
        troubled = False
        while True:
            began = self._clock()
            try:
                if version is None:
                    with many_objects():
                        version = await self._list()
                elif troubled:
                    # A watch says nothing until something changes: ask what answers at once.
                    await self._client.node(self._name)
                    self._items.put_nowait(Current())
                troubled = False
                async with aclosing(self._client.watch(version, self._watch_seconds)) as watch:
                    async for kind, node in watch:
                        version = str(node["metadata"]["resourceVersion"])
                        if kind != "BOOKMARK":
                            self._say(kind, node)
            except GoneError:
                version = None
            except KubeError as error:
                if not troubled:
                    self._items.put_nowait(Trouble((str(error),)))
                    troubled = True
            if not troubled and self._clock() - began >= HASTY_SECONDS:
                backoff.reset()
                continue
            await self._sleep(backoff.next())

    async def _list(self) -> str:
        """Say everything there is; the version it is of."""
        nodes, version = await self._client.objects()
        others = [node for node in nodes if name_of(node) != self._name]
        own = next((node for node in nodes if name_of(node) == self._name), None)
        self._see_own(own)
        # In a thread: thousands of Nodes are a second of reading.
        said = await asyncio.to_thread(lambda: {name_of(node): self._read(node) for node in others})
        self._keys = {name: tuple(items) for name, items in said.items()}
        everything = {key: value for items in said.values() for key, value in items.items()}
        self._items.put_nowait(Snapshot({**main_file_peers(self._config), **everything}))
        return version

    def _see_own(self, node: Mapping[str, Any] | None) -> None:
        self._own = node
        self._own_changed.set()

    def _read(self, node: Mapping[str, Any]) -> dict[str, Said]:
        return read_flannel(node) if self._flannel else read_ours(node)

    def _say(self, kind: str, node: Mapping[str, Any]) -> None:
        name = name_of(node)
        if name == self._name:
            self._see_own(None if kind == "DELETED" else node)
            return
        said = {} if kind == "DELETED" else self._read(node)
        for key in self._keys.pop(name, ()):
            if key not in said:
                self._items.put_nowait(Remove(key))
        for key, value in said.items():
            self._items.put_nowait(Upsert(key, value))
        if said:
            self._keys[name] = tuple(said)


def _network_available() -> dict[str, str]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "PodloomIsUp",
        "message": "podloom is running on this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
