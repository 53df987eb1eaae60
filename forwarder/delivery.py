"""How packets get on that we write to the TAP: on the way of the write itself, or in a thread of the kernel's
(threaded NAPI, Linux 5.12), which costs the single packet a wake and takes half the work of many off ours.

So there is a thread while bytes move in bulk, either way: on a node that sends, acknowledgements come back,
and each lets a pod send more, which would be the write's work too. The event loop's; what blocks runs beside
it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Final

from forwarder import sysfs
from forwarder.bulk import LOOK_SECONDS, Bulk

# linux/if_tun.h
TUNGETIFF, TUNSETSNDBUF = 0x800454D2, 0x400454D4
IFREQ_BYTES, NAME_BYTES = 40, 16

UNBOUNDED: Final = 2**31 - 1
"""The kernel's default: nothing waits, and small frames need no allocation of their own."""

QUEUE_BYTES: Final = 16 << 20
"""What may wait for the thread, as the kernel counts memory; a write that finds no room is dropped."""


class Delivery:
    """`turned` is told of each turn of the pump; the rest follows."""

    def __init__(self, tap_fd: int, moved_bytes: Callable[[], int]) -> None:
        """`tap_fd` is borrowed. `moved_bytes` is asked for a count that only grows."""
        self.refusal: str | None = None
        self._tap_fd = tap_fd
        self._moved_bytes = moved_bytes
        self._allowed = False
        self._bulk = Bulk()
        self._threaded = False
        self._look: asyncio.TimerHandle | None = None
        self._settling: asyncio.Task[None] | None = None

    def allow(self, on: bool) -> None:
        """Whether there may be a thread. Allowing tries again what the kernel refused before."""
        self._allowed = on
        self.refusal = None
        if self._threaded or self._settling is not None:
            self._settle_soon()
        elif on:
            self._set(os.dup(self._tap_fd), False)  # no change, but refused if the other would be

    def turned(self) -> None:
        """Packets moved. On the running loop."""
        if self._look is None and self._allowed and self.refusal is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_at_load)

    def forget(self) -> None:
        """The TAP is another one now."""
        self._threaded = False

    def stop(self) -> None:
        """Look no more; the TAP stays as it is."""
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_at_load(self) -> None:
        self._look = None
        bulk = self._bulk.look(asyncio.get_running_loop().time(), self._moved_bytes())
        self._settle_soon()
        if bulk or self._bulk.moving:
            self.turned()

    @property
    def _wanted(self) -> bool:
        return self._allowed and self.refusal is None and self._bulk.on

    def _settle_soon(self) -> None:
        if self._settling is None and self._threaded != self._wanted:
            self._settling = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        try:
            while self._threaded != self._wanted:
                self._threaded = self._wanted
                # To configure a link is to wait for others who do.
                await asyncio.to_thread(self._set, os.dup(self._tap_fd), self._threaded)
        finally:
            self._settling = None

    def _set(self, tap_fd: int, on: bool) -> None:
        """`tap_fd` is ours to close, so that it is the TAP's as long as we need it."""
        try:
            set_threaded(tap_fd, on)
        except OSError as error:
            self.refusal = f"refused by the kernel: {error.strerror}"
        finally:
            os.close(tap_fd)


def set_threaded(tap_fd: int, on: bool) -> None:
    """Give the TAP its thread, and a bound to what waits for it, or take both away. OSError as the kernel
    says: EOPNOTSUPP of a TAP without NAPI."""
    if on:
        fcntl.ioctl(tap_fd, TUNSETSNDBUF, struct.pack("i", QUEUE_BYTES))
    with sysfs.opened(f"class/net/{name_of(tap_fd)}/threaded", os.O_WRONLY) as attribute:
        os.write(attribute, b"1" if on else b"0")
    if not on:
        fcntl.ioctl(tap_fd, TUNSETSNDBUF, struct.pack("i", UNBOUNDED))


def name_of(tap_fd: int) -> str:
    """The TAP's name in its network namespace."""
    return fcntl.ioctl(tap_fd, TUNGETIFF, bytes(IFREQ_BYTES))[:NAME_BYTES].rstrip(b"\0").decode()
