"""The node's resolver, fed: the configuration's services, this node's pods, and a cluster's Services."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from forwarder.config import Config
from forwarder.names.pods import Attached, pods_of
from forwarder.names.records import Replace, Service
from forwarder.names.service import NamesError, NameService
from forwarder.names.settings import Settings

log = logging.getLogger("podloom")


class NodeNames:
    """`start` it on the running loop, tell it what changes, `close` it."""

    def __init__(self, settings: Settings, read_pods: Callable[[], Iterable[Attached]]) -> None:
        """`read_pods` may block, and raises NamesError if this node's pods cannot be read."""
        self._service = NameService(settings)
        self._read_pods = read_pods
        self._pods_changed = asyncio.Event()
        self._stack = AsyncExitStack()

    async def start(self, config: Config) -> None:
        """NamesError if the resolver cannot be started."""
        self.set_services(config.services)
        await self._name_pods()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._service.close)
            await self._service.start()
            self._run(undo, self._follow_pods())
            if config.discovery.source == "kubernetes":
                from forwarder.discovery.kube_client import KubeClient, access_by
                from forwarder.names.kube_services import KubeServices

                client = KubeClient(access_by(config.discovery.kubeconfig))
                undo.push_async_callback(client.close)
                self._run(undo, KubeServices(client, partial(self._service.apply, "kubernetes")).follow())
            self._stack = undo.pop_all()

    async def close(self) -> None:
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
            self._service.apply("pods", Replace(pods_of(records)))

    @staticmethod
    def _run(stack: AsyncExitStack, follow: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(follow)
        task.add_done_callback(log_failure)
        stack.callback(task.cancel)


def log_failure(task: asyncio.Task[None]) -> None:
    """What should not happen to names must not end the forwarding of packets."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("names are not followed any more: start podloom again", exc_info=error)
