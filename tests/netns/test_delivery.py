"""The thread behind a real TAP: there while bytes move in bulk, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from pyroute2.ethtool.ioctl import IoctlEthtool
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from fastpath.kernel.tap import VNET_HEADER_SIZE
from forwarder import links, sysfs
from forwarder.bulk import BULK_BYTES_PER_SECOND, CALM_SECONDS
from forwarder.delivery import QUEUE_BYTES, UNBOUNDED, Delivery, set_threaded
from forwarder.demo import netns as namespaces
from tests.netns_tools import Namespace

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

ROUTER_MAC = bytes.fromhex("02706c000009")
TUNGETSNDBUF = 0x800454D3  # linux/if_tun.h
PACKETS = 3_000
SECONDS = 10.0


def read(attribute: str) -> str:
    """Of the TAP, in sysfs."""
    with sysfs.opened(f"class/net/loom-tap/{attribute}", os.O_RDONLY) as descriptor:
        return os.read(descriptor, 64).decode().strip()


@dataclass
class Tap:
    namespace: Namespace
    fd: int

    @property
    def threaded(self) -> bool:
        return read("threaded") == "1"

    @property
    def bound(self) -> int:
        return int(struct.unpack("i", fcntl.ioctl(self.fd, TUNGETSNDBUF, bytes(4)))[0])


@pytest.fixture
def tap(netns: Callable[[], Namespace]) -> Iterator[Tap]:
    """Ours, up, with an address; the test runs beside it, and so do threads that it begins."""
    namespace = netns()
    with namespaces.inside(namespace.path):
        device = links.open_tap("loom-tap", "n1", ROUTER_MAC)
        try:
            namespace.ip("addr", "add", "10.42.1.1/24", "dev", "loom-tap")
            namespace.ip("link", "set", "loom-tap", "up")
            yield Tap(namespace, device.fileno())
        finally:
            device.close()


class Counter:
    """Bytes that move in bulk for as long as it is asked to."""

    def __init__(self) -> None:
        self.total = 0
        self.bulk = True

    def __call__(self) -> int:
        self.total += int(BULK_BYTES_PER_SECOND) if self.bulk else 0
        return self.total


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (the kernel tells nobody)
            await asyncio.sleep(0.01)


def played(tap: Tap, play: Callable[[Delivery, Counter], Awaitable[None]]) -> None:
    """Play it with a delivery that is allowed a thread."""

    async def main() -> None:
        counter = Counter()
        delivery = Delivery(tap.fd, counter)
        delivery.allow(True)
        assert delivery.refusal is None
        try:
            await play(delivery, counter)
        finally:
            delivery.stop()

    asyncio.run(main())


def test_it_is_there_while_packets_come_in_bulk(tap: Tap) -> None:
    async def play(delivery: Delivery, counter: Counter) -> None:
        assert (tap.threaded, tap.bound) == (False, UNBOUNDED)
        delivery.turned()
        await until(lambda: tap.threaded)
        assert tap.bound == QUEUE_BYTES
        counter.bulk = False
        await until(lambda: not tap.threaded)
        await until(lambda: tap.bound == UNBOUNDED)
        await asyncio.sleep(2 * CALM_SECONDS)  # it looks no more, until packets move again
        counter.bulk = True
        assert not tap.threaded
        delivery.turned()
        await until(lambda: tap.threaded)

    played(tap, play)


def test_switched_off_it_goes_at_once_and_does_not_come_back(tap: Tap) -> None:
    async def play(delivery: Delivery, counter: Counter) -> None:
        delivery.turned()
        await until(lambda: tap.threaded)
        delivery.allow(False)
        await until(lambda: not tap.threaded)
        delivery.turned()
        await asyncio.sleep(0.3)
        assert not tap.threaded
        delivery.allow(True)
        delivery.turned()
        await until(lambda: tap.threaded)

    played(tap, play)


def test_a_tap_without_napi_says_why_it_has_none(tap: Tap) -> None:
    plain = links.open_device("plain", "n1")
    try:
        delivery = Delivery(plain.fileno(), Counter())
        delivery.allow(True)
        assert delivery.refusal == "refused by the kernel: Operation not supported"
    finally:
        plain.close()


def test_the_kernel_merges_nothing_behind_our_back(tap: Tap) -> None:
    with closing(IoctlEthtool("loom-tap")) as device:
        assert not device.get_features().is_active("rx-gro")


def test_packets_arrive_whole_and_in_order_while_the_thread_comes_and_goes(tap: Tap) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        receiver.bind(("10.42.1.1", 7))
        receiver.settimeout(SECONDS)
        packet = Ether(dst=read("address")) / IP(src="10.42.1.7", dst="10.42.1.1") / UDP(dport=7, chksum=0)
        head = bytes(packet / bytes(4))[:-4]
        for number in range(PACKETS):
            if number % 100 == 0:
                set_threaded(tap.fd, number % 200 == 0)
            os.write(tap.fd, bytes(VNET_HEADER_SIZE) + head + struct.pack("!I", number))
        received = [struct.unpack("!I", receiver.recv(64))[0] for _ in range(PACKETS)]
    assert received == list(range(PACKETS))
