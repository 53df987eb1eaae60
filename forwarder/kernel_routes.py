"""The kernel's routes over time: asked for, watched, and kept to what is wanted.

Asking is a send and a receive on a socket of its own, some microseconds, and may be done on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from typing import Any, Final, Self

from forwarder import links, rtnetlink
from forwarder.addresses import Address, Network
from forwarder.legs import Hop, NextHop
from forwarder.links import LinkError
from forwarder.reconcile import ROUTE_PROTOCOL, Operation, Route, Wiring, wanted
from forwarder.routes import changes, routes
from forwarder.rtnetlink import Done, LinkChange, Message, Refused, RouteChange

log = logging.getLogger("podloom")

REST_SECONDS: Final = 1.0
"""After a refusal, until the same is tried again."""

LOOK_PAUSE_SECONDS: Final = 1.0
"""After each reading of all routes: links change in bursts."""

RECEIVE_BYTES: Final = 1 << 16
RECEIVE_BATCH: Final = 64
"""Events in one go on the event loop."""

EVENT_BUFFER_BYTES: Final = 1 << 20

# linux/netlink.h
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12


class RouteKeeper:
    """Holds the kernel's routes of ours to what three ask for: say what you ask, then `settle`."""

    def __init__(self, wiring: Wiring) -> None:
        self.mtus: Mapping[Network, int] = {}
        self.hops: Mapping[Network, Hop] = {}
        self.by_bgp: Set[Network] = frozenset()
        self._wiring = wiring
        self._cluster = wanted(wiring).routes
        self._installed: frozenset[Route] | None = None
        self._settled_for: tuple[object, ...] = ()
        self._doubted = False
        self._lock = asyncio.Lock()
        self._fault: str | None = None
        self._rest_until = 0.0

    def doubt(self) -> None:
        """Something may have been undone: look before the next change."""
        self._doubted = True

    def note_gone(self, destination: Network, metric: int) -> None:
        """A route of ours went, whoever removed it."""
        if any(
            route.destination == destination and (route.metric or metric) == metric
            for route in self._installed or ()
        ):
            self.doubt()

    async def settle(self) -> None:
        """Bring the kernel to what is wanted. What it refuses is logged once, and tried again next time."""
        async with self._lock:
            try:
                if await self._settle():
                    self._fault = None
            except LinkError as error:
                self._rest_until = time.monotonic() + REST_SECONDS
                if str(error) != self._fault:
                    self._fault = str(error)
                    log.error("the kernel's routes are not what they should be: %s", error)

    async def repair(self, wiring: Wiring) -> list[Operation]:
        """Bring the kernel to the state that the wiring asks for, with our routes by the bridge; what had to
        be done. The others follow when it is settled. LinkError if the kernel refuses."""
        async with self._lock:
            self._wiring, self._cluster = wiring, wanted(wiring).routes
            # What is new since it was settled is no repair.
            target = self._installed or routes(self._cluster, self.mtus, self.hops, self.by_bgp)
            ours = frozenset(route for route in target if route.link == wiring.bridge)
            try:
                return await asyncio.to_thread(links.ensure, wiring, ours)
            finally:
                self.doubt()

    async def _settle(self) -> bool:
        """False if it rests from a refusal."""
        asked = self.mtus, self.hops, self.by_bgp
        if asked == self._settled_for:
            if self._installed is not None and not self._doubted:
                return True
            if time.monotonic() < self._rest_until:
                return False
        self._settled_for = asked
        if self._installed is None or self._doubted:
            self._doubted = False
            self._installed = await asyncio.to_thread(links.own_routes, self._wiring)
        target = routes(self._cluster, *asked)
        installed, operations = self._installed, changes(self._installed, target)
        # Unknown until it went through.
        self._installed = None
        await asyncio.to_thread(links.change_routes, operations, installed)
        self._installed = target
        return True


class RouteAsker:
    """Asks the kernel where packets to an address go."""

    def __init__(self) -> None:
        self._socket = _open(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def links(self, endpoints: Collection[Address]) -> dict[int, str]:
        """By index the names of the links that have these addresses, our endpoints."""
        found = {}
        for version in {endpoint.version for endpoint in endpoints}:
            for message in _dump(self._socket, rtnetlink.dump_addresses(version)):
                if isinstance(message, LinkChange) and message.address in endpoints:
                    with contextlib.suppress(OSError):  # It is gone again.
                        found[message.link] = socket.if_indextoname(message.link)
        return found

    def reached(self, endpoint: Address, ours: Mapping[int, str]) -> NextHop | str:
        """The endpoint as a next hop if it is on the segment of a link of `ours`, or why it is not."""
        self._socket.send(rtnetlink.ask_route(endpoint))
        for message in rtnetlink.messages(self._socket.recv(RECEIVE_BYTES)):
            if isinstance(message, RouteChange) and message.unicast and message.link is not None:
                if message.gateway is not None:
                    return f"{endpoint} is on another segment, reached by way of {message.gateway}"
                if message.link in ours:
                    return NextHop(endpoint, ours[message.link])
                return f"{endpoint} is reached by a link that has none of node.endpoints"
        return f"there is no route to {endpoint}"


class RouteWatch:
    """Follows the main table's routes of one protocol, and tells of whatever may touch ours.

    IPv4's routes go with their link without a word, so a change of a link is one of the routes.
    """

    def __init__(
        self,
        protocol: int | None,
        *,
        changed: Callable[[], None],
        disturbed: Callable[[int], None],
        ours_gone: Callable[[Network, int], None],
    ) -> None:
        """`changed` is called when `destinations` may have changed; `disturbed`, with a link's index, when
        the link or its addresses did, or with 0 when that may be any; `ours_gone` with the destination and
        metric of a route that went and carried our mark."""
        self._protocol = protocol
        self._changed = changed
        self._disturbed = disturbed
        self._ours_gone = ours_gone
        self._found: dict[tuple[Network, int], None] = {}
        self._missed: list[RouteChange] | None = None
        self._stale = asyncio.Event()
        self._stale.set()

    @property
    def destinations(self) -> Set[Network]:
        """Of the followed protocol's routes."""
        return frozenset(destination for destination, _ in self._found)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        with _open(rtnetlink.GROUPS) as events:
            events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, EVENT_BUFFER_BYTES)
            events.setblocking(False)
            loop.add_reader(events, self._read, events)
            try:
                while True:
                    await self._stale.wait()
                    self._stale.clear()
                    if self._protocol is not None:
                        await self._look(self._protocol)
                    await asyncio.sleep(LOOK_PAUSE_SECONDS)
            finally:
                loop.remove_reader(events)

    async def _look(self, protocol: int) -> None:
        self._missed = []
        found = await asyncio.to_thread(read_routes, protocol)
        self._found = dict.fromkeys((route.destination, route.metric) for route in found)
        # In order and on top: of what the reading saw already nothing changes.
        missed, self._missed = self._missed, None
        for change in missed:
            self._note(change)
        self._changed()

    def _read(self, events: socket.socket) -> None:
        try:
            for _ in range(RECEIVE_BATCH):
                for message in rtnetlink.messages(events.recv(RECEIVE_BYTES)):
                    self._take(message)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._stale.set()
            self._disturbed(0)

    def _take(self, message: Message) -> None:
        if isinstance(message, LinkChange):
            self._stale.set()
            self._disturbed(message.link)
        elif isinstance(message, RouteChange) and message.table == rtnetlink.TABLE_MAIN:
            if message.protocol == self._protocol:
                self._note(message)
                self._changed()
            elif message.protocol == ROUTE_PROTOCOL and not message.added:
                self._ours_gone(message.destination, message.metric)

    def _note(self, change: RouteChange) -> None:
        if self._missed is not None:
            self._missed.append(change)
        key = change.destination, change.metric
        if change.added:
            self._found[key] = None
        else:
            self._found.pop(key, None)


def read_routes(protocol: int) -> list[RouteChange]:
    """The main table's of that protocol, in both families."""
    with _open(0) as asking:
        with contextlib.suppress(OSError):  # Before Linux 4.20 all come.
            asking.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        return [
            message
            for version in (4, 6)
            for message in _dump(asking, rtnetlink.dump_routes(version, protocol))
            if isinstance(message, RouteChange)
            and (message.table, message.protocol) == (rtnetlink.TABLE_MAIN, protocol)
        ]


def _open(groups: int) -> Any:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    opened.bind((0, groups))
    return opened


def _dump(asking: Any, request: bytes) -> Iterator[Message]:
    asking.send(request)
    while True:
        for message in rtnetlink.messages(asking.recv(RECEIVE_BYTES)):
            if isinstance(message, Done | Refused):
                return
            yield message
