"""That something has changed of the host's links, addresses or our own entries: it is then looked at anew.

The kernel tells by netlink multicast (rtnetlink(7)). What a message says is not believed, since messages get
lost; only whether it can concern us is read from it, and that by a few bytes: a host may change thousands of
routes and neighbours a second, of which none is ours.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from forwarder import rtnetlink
from forwarder.reconcile import ROUTE_PROTOCOL

RECEIVE_BYTES: Final = 1 << 16

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_NEWNEIGH, RTM_DELNEIGH = 24, 25, 28, 29
RTMGRP_LINK, RTMGRP_NEIGH, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x4, 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400

GROUPS: Final = (
    RTMGRP_LINK
    | RTMGRP_NEIGH
    | RTMGRP_IPV4_IFADDR
    | RTMGRP_IPV4_ROUTE
    | RTMGRP_IPV6_IFADDR
    | RTMGRP_IPV6_ROUTE
)

_DESTINATION_LENGTH, _PROTOCOL = 1, 5  # in struct rtmsg


def concerns(datagram: bytes, marks: Collection[bytes]) -> bool:
    """Whether a change in it can be one of a link, an address, a default route, a route of ours that went, or
    a neighbour with one of the marks: addresses and MACs that are ours alone. Pure."""
    return any(_concerns(kind, body, marks) for kind, body, _ in rtnetlink.split(datagram))


def _concerns(kind: int, body: bytes, marks: Collection[bytes]) -> bool:
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        if len(body) <= _PROTOCOL:
            return False
        went = kind == RTM_DELROUTE and body[_PROTOCOL] == ROUTE_PROTOCOL
        return went or body[_DESTINATION_LENGTH] == 0
    if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
        return any(mark in body for mark in marks)
    return kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR)


class LinkEvents:
    """The socket, on the running loop; `wait` for what concerns us."""

    def __init__(self, marks: Collection[bytes]) -> None:
        """`marks` as of `concerns`."""
        self._marks = marks
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.bind((0, GROUPS))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def note(self) -> None:
        """Something has changed that the kernel does not tell of."""
        self._changed.set()

    async def wait(self, seconds: float) -> None:
        """Return when something has changed since the last return, or when the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        self._changed.clear()

    def _receive(self) -> None:
        try:
            datagram = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: some were lost, and they may have been ours.
            self._changed.set()
            return
        if concerns(datagram, self._marks):
            self._changed.set()
