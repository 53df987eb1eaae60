"""The node's resolver, fed: the configuration's services, this node's pods, and what the source says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from forwarder.config import Config, own_record
from forwarder.names.pods import Attached, pods_of
from forwarder.names.records import Pod, Replace, Service
from forwarder.names.service import NamesError, NameService
from forwarder.names.settings import Settings

if TYPE_CHECKING:  # with the source that needs them: aiohttp is a fifth of a daemon's memory
    from forwarder.discovery.etcd_client import EtcdClient
    from forwarder.discovery.kube_client import KubeClient
    from forwarder.names.etcd_names import EtcdNames
    from forwarder.names.etcd_publisher import PodPublisher

log = logging.getLogger("podloom")


class NodeNames:
    """`start` it on the running loop, tell it what changes, `close` it."""

    def __init__(self, settings: Settings, read_pods: Callable[[], Iterable[Attached]]) -> None:
        """`read_pods` may block, and raises NamesError if this node's pods cannot be read."""
        self._service = NameService(settings)
        self._read_pods = read_pods
        self._pods_changed = asyncio.Event()
        self._stack, self._source = AsyncExitStack(), AsyncExitStack()
        self._pods: tuple[Pod, ...] = ()
        self._publisher: PodPublisher | None = None
        self._client: EtcdClient | KubeClient | None = None

    async def start(self, config: Config) -> None:
        """NamesError if the resolver cannot be started."""
        self.set_services(config.services)
        await self._name_pods()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._service.close)
            await self._service.start()
            self._run(undo, self._follow_pods())
            self._stack = undo.pop_all()
        await self.follow(config)

    async def follow(self, config: Config) -> None:
        """Take names from the configuration's source, and from the one before no more; what that said stays
        until this one is heard."""
        await self._source.aclose()
        self._publisher = self._client = None
        match config.discovery.source:
            case "etcd":
                self._run(self._source, self._etcd_names(config).run())
            case "kubernetes":
                from forwarder.discovery.kube_client import KubeClient, access_by
                from forwarder.names.kube_services import KubeServices

                client = self._client = KubeClient(access_by(config.discovery.kubeconfig))
                self._source.push_async_callback(client.close)
                tell = partial(self._service.apply, "kubernetes")
                self._run(self._source, KubeServices(client, tell).follow())

    def _etcd_names(self, config: Config) -> EtcdNames:
        from forwarder.discovery.etcd import open_client, root_of
        from forwarder.names.etcd_names import EtcdNames
        from forwarder.names.etcd_publisher import PodPublisher

        record, root = own_record(config), root_of(config.discovery)
        client = self._client = open_client(config.discovery)
        self._source.push_async_callback(client.close)
        self._publisher = PodPublisher(client, root, record.id, list(map(str, record.endpoints)))
        self._publisher.put(self._pods)
        domain, networks = config.names.domain, config.cluster.cidrs
        return EtcdNames(client, root, domain, networks, self._publisher, self._service.apply)

    def relocate(self, config: Config) -> None:
        """This node has the endpoints of this configuration now; connections are to be made anew."""
        if self._publisher is not None:
            self._publisher.relocate(list(map(str, config.node.endpoints)))
        if self._client is not None:
            self._client.reconnect()

    async def close(self) -> None:
        await self._source.aclose()
        await self._stack.aclose()

    def set_services(self, services: Iterable[Service]) -> None:
        """Those of the configuration."""
        self._service.apply("static", Replace(tuple(services)))

    def note_pods(self) -> None:
        """Pods came or went."""
        self._pods_changed.set()

    async def ask(self, name: str | None) -> dict[str, Any]:
        """What the resolver would answer for a name or address, or all it has. NamesError if it does not."""
        return await self._service.ask(name)

    async def _follow_pods(self) -> None:
        while True:
            await self._pods_changed.wait()
            self._pods_changed.clear()
            await self._name_pods()

    async def _name_pods(self) -> None:
        try:
            records = await asyncio.to_thread(self._read_pods)
        except NamesError as error:
            log.error("the names of pods are not up to date: %s", error)
        else:
            self._pods = pods_of(records)
            self._service.apply("pods", Replace(self._pods))
            if self._publisher is not None:
                self._publisher.put(self._pods)

    @staticmethod
    def _run(stack: AsyncExitStack, follow: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(follow)
        task.add_done_callback(log_failure)
        stack.callback(task.cancel)


def log_failure(task: asyncio.Task[None]) -> None:
    """What should not happen to names must not end the forwarding of packets."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("names are not followed any more: start podloom again", exc_info=error)
