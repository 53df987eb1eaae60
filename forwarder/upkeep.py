"""Keeps the node's place in a host that changes: addresses come and go, devices carry more or less, and what
is ours in the kernel is altered by others' hands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Final

from forwarder import links
from forwarder.addresses import VIRTUAL_ROUTER, Address
from forwarder.config import Config
from forwarder.dataplane import DataPlane, DataPlaneError
from forwarder.link_events import LinkEvents
from forwarder.links import LinkError
from forwarder.neighbourhood import Neighbourhood
from forwarder.plan import device_mtus, inner_mtus, pod_mtu_bytes, underlay_links, with_endpoints
from forwarder.reconcile import CreateBridge, Wiring
from forwarder.underlay import AUTO, UnderlayError

log = logging.getLogger("podloom")

SETTLE_SECONDS: Final = 0.1
"""From a change until it is looked at: changes seldom come alone."""

LOOK_PAUSES: Final = 5
"""As many times as long as a look took, there is no other: thousands of routes take a while to read."""

RECHECK_SECONDS: Final = 30.0
"""A look without a reason: the kernel forgets to tell when it has too much to tell."""

TRY_AGAIN_SECONDS: Final = 3.0
"""After a look that failed, without another reason."""

MEND_SECONDS: Final = 5.0
"""A TAP that breaks again so soon will not be kept by opening it."""


class Upkeep:
    """`run` it beside the data plane; `look` when the configuration has changed; `mend` a broken TAP."""

    def __init__(
        self,
        config: Config,
        wiring: Wiring,
        devices: Mapping[int, int],
        dataplane: DataPlane,
        neighbourhood: Neighbourhood,
        *,
        moved: Callable[[Config], None],
        attach: Callable[[Wiring], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """`devices` is by IP version the MTU of the endpoint's device. `moved` is told when the endpoints are
        others; `attach`, on a worker thread, is to bring the pods to a bridge that is new or resized."""
        self._config = config
        self._wiring = wiring
        self._devices = dict(devices)
        self._dataplane = dataplane
        self._neighbourhood = neighbourhood
        self._moved, self._attach, self._on_failure = moved, attach, on_failure
        self._looking = asyncio.Lock()
        self._mended_at = float("-inf")
        self._mending: set[asyncio.Task[None]] = set()
        self._fault: str | None = None
        marks = (wiring.router_mac, *(address.packed for address in VIRTUAL_ROUTER.values()))
        self._events = LinkEvents(marks)

    @property
    def fault(self) -> str | None:
        """Why the node is not what it should be, if it is not."""
        return self._fault

    @property
    def wiring(self) -> Wiring:
        return self._wiring

    async def run(self) -> None:
        """Look now, and whenever something has changed; ends only by cancellation."""
        with self._events:
            await self.look()
            while True:
                await self._events.wait(TRY_AGAIN_SECONDS if self._fault else RECHECK_SECONDS)
                await asyncio.sleep(SETTLE_SECONDS)
                began = time.monotonic()
                await self.look()
                await asyncio.sleep(LOOK_PAUSES * (time.monotonic() - began))

    async def reconfigure(self, config: Config) -> None:
        """Go by this configuration from now on."""
        self._config = config
        await self.look()

    async def look(self) -> None:
        """Find what has changed, and do what follows from it."""
        async with self._looking:
            try:
                await self._look()
            except (LinkError, UnderlayError, DataPlaneError) as error:
                if str(error) != self._fault:
                    log.error("%s", error)
                self._fault = str(error)
            else:
                if self._fault is not None:
                    log.info("the node is as it should be again")
                self._fault = None

    async def _look(self) -> None:
        fault: Exception | None = None
        resized = False
        # A module that somebody loads changes what bridges do.
        self._wiring = replace(self._wiring, bridge_netfilter=links.bridge_netfilter())
        try:
            resized = await self._follow_host()
        except (UnderlayError, DataPlaneError) as error:
            fault = error  # What is ours is put right all the same.
        if not await asyncio.to_thread(links.has_tap, self._wiring.tap) and self._may_open_tap():
            await self._open_tap()
        done = await self._neighbourhood.repair(self._wiring)
        if done and not resized:
            log.warning("put right in the kernel: %s", "; ".join(map(str, done)))
        if resized or any(isinstance(operation, CreateBridge) for operation in done):
            await asyncio.to_thread(self._attach, self._wiring)
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Mend nothing any more."""
        for task in self._mending:
            task.cancel()

    def mend(self, error: Exception) -> None:
        """The data plane stopped by this error: open its TAP again if that is gone, or else fail by it."""
        self._mending.add(task := asyncio.create_task(self._mend(error, self._mended_at)))
        task.add_done_callback(self._mending.discard)

    async def _mend(self, error: Exception, before: float) -> None:
        await self.look()
        if self._mended_at == before:
            self._on_failure(error)

    def _may_open_tap(self) -> bool:
        """By whoever sees first that it is gone: the data plane or a look."""
        return time.monotonic() - self._mended_at >= MEND_SECONDS

    async def _follow_host(self) -> bool:
        """Go by the endpoints and MTUs of now; whether the pods' MTU is another."""
        config = self._config
        host = await asyncio.to_thread(links.observe, routes=config.node.device == AUTO)
        config = with_endpoints(config, host, config.node.endpoints)
        devices = device_mtus(config, host, self._devices)
        before = self._dataplane.endpoints
        moves = config.node.endpoints != before
        if moves:
            self._dataplane.move(config.node.endpoints)
            log.warning("the node is at %s now, and was at %s", _list(config.node.endpoints), _list(before))
        elif devices == self._devices:
            return False
        self._config, self._devices = config, devices
        mtus = inner_mtus(config, devices)
        links_of_ours = await asyncio.to_thread(underlay_links, config, host)
        wiring = replace(self._wiring, mtu_bytes=pod_mtu_bytes(mtus, self._wiring.families), **links_of_ours)
        resized, self._wiring = wiring.mtu_bytes != self._wiring.mtu_bytes, wiring
        if resized:
            self._dataplane.resize(wiring.mtu_bytes)
            log.warning("pods have an MTU of %d now", wiring.mtu_bytes)
        await self._neighbourhood.replan(config.local, mtus, wiring.mtu_bytes)
        if moves:
            self._moved(config)
        return resized

    async def _open_tap(self) -> None:
        wiring = self._wiring
        tap = await asyncio.to_thread(links.open_tap, wiring.tap, wiring.node_id, wiring.router_mac)
        with closing(tap):
            self._dataplane.replace_tap(tap.fileno())
        self._mended_at = time.monotonic()
        log.warning("the TAP %s was gone, and is made again", wiring.tap)


def _list(addresses: Iterable[Address]) -> str:
    return ", ".join(map(str, addresses))
