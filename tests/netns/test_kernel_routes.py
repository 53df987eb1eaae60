"""What the kernel is asked and tells of routes, in namespaces of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address, ip_network

import pytest

from cni.netns import call_in
from forwarder.addresses import Network
from forwarder.kernel_routes import RouteAsker, RouteWatch, read_routes
from forwarder.legs import NextHop
from tests.netns_tools import Namespace

pytestmark = pytest.mark.root

BIRD = 12


@pytest.fixture
def host(netns: Callable[[], Namespace]) -> Namespace:
    host = netns()
    for name, number in (("eth0", 2), ("eth1", 3)):
        host.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
        for end in (name, f"{name}-peer"):
            host.ip("link", "set", end, "up")
        host.ip("addr", "add", f"192.0.{number}.1/24", "dev", name)
        host.ip("addr", "add", f"2001:db8:{number}::1/64", "dev", name, "nodad")
    host.ip("route", "add", "198.51.100.0/24", "via", "192.0.2.254")
    host.ip("route", "add", "203.0.113.0/24", "via", "inet6", "2001:db8:2::254", "dev", "eth0")
    host.ip("route", "add", "blackhole", "100.64.0.0/10")
    return host


def test_who_is_on_the_segment(host: Namespace) -> None:
    def ask() -> dict[str, NextHop | str]:
        with RouteAsker() as asker:
            links = asker.links([ip_address("192.0.2.1"), ip_address("2001:db8:2::1")])
            assert list(links.values()) == ["eth0"]
            return {text: asker.reached(ip_address(text), links) for text in expected}

    expected = {
        "192.0.2.9": NextHop(ip_address("192.0.2.9"), "eth0"),
        "2001:db8:2::9": NextHop(ip_address("2001:db8:2::9"), "eth0"),
        "192.0.3.9": "192.0.3.9 is reached by a link that has none of node.endpoints",
        "198.51.100.9": "198.51.100.9 is on another segment, reached by way of 192.0.2.254",
        "203.0.113.9": "203.0.113.9 is on another segment, reached by way of 2001:db8:2::254",
        "100.64.0.9": "there is no route to 100.64.0.9",
        "8.8.8.8": "there is no route to 8.8.8.8",
        "192.0.2.1": "there is no route to 192.0.2.1",
        "2001:db8:9::9": "there is no route to 2001:db8:9::9",
    }
    with host.path.open() as netns:
        assert call_in(netns.fileno(), ask) == expected


def networks(*texts: str) -> set[Network]:
    return set(map(ip_network, texts))


def test_a_protocols_routes_are_read_and_followed(host: Namespace) -> None:
    def add(prefix: str, *words: str) -> None:
        host.ip("route", "add", prefix, "dev", "eth1", "proto", str(BIRD), *words)

    add("10.42.2.0/24", "metric", "32")
    add("fd42:0:0:2::/64", "metric", "32")
    host.ip("route", "add", "10.42.9.0/24", "dev", "eth1", "proto", "static")
    host.ip("route", "add", "10.42.8.0/24", "dev", "eth1", "proto", str(BIRD), "table", "99")
    first = networks("10.42.2.0/24", "fd42:0:0:2::/64")
    links: list[int] = []
    gone: list[tuple[Network, int]] = []

    async def follow() -> None:
        changed = asyncio.Event()
        watch = RouteWatch(
            BIRD, changed=changed.set, disturbed=links.append, ours_gone=lambda *what: gone.append(what)
        )
        task = asyncio.create_task(watch.run())

        async def until(destinations: set[Network]) -> None:
            async with asyncio.timeout(5):
                while watch.destinations != destinations:
                    changed.clear()
                    await changed.wait()

        await until(first)
        add("10.42.3.0/24", "metric", "32")
        await until(first | networks("10.42.3.0/24"))
        host.ip("route", "del", "10.42.2.0/24", "dev", "eth1", "proto", str(BIRD))
        await until(networks("10.42.3.0/24", "fd42:0:0:2::/64"))
        host.ip("route", "add", "10.42.4.0/24", "dev", "eth0", "proto", "71", "metric", "7101")
        host.ip("route", "del", "10.42.4.0/24", "dev", "eth0", "proto", "71", "metric", "7101")
        # Of these IPv4's go without a word.
        host.ip("link", "set", "eth1", "down")
        await until(set())
        task.cancel()
        await asyncio.wait([task])

    with host.path.open() as netns:
        assert {route.destination for route in call_in(netns.fileno(), read_routes, BIRD)} == first
        call_in(netns.fileno(), asyncio.run, follow())
    assert links
    assert gone == [(ip_network("10.42.4.0/24"), 7101)]
