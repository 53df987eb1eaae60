from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.pipeline.harness import Node, Wire, wire_address


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(params=[4, 6], ids=["IPv4 wire", "IPv6 wire"])
def family(request: pytest.FixtureRequest) -> int:
    """The outer IP version."""
    if request.param == 6 and not has_ipv6_loopback():
        pytest.skip("this machine has no ::1: the IPv6 wire is NOT tested in this run")
    return int(request.param)


@pytest.fixture(params=[4, 6], ids=["IPv4 inside", "IPv6 inside"])
def inner(request: pytest.FixtureRequest) -> int:
    """The inner IP version."""
    return int(request.param)


@pytest.fixture(params=["geneve", "vxlan"])
def encapsulation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opened."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_node(opened: ExitStack) -> Callable[..., Node]:
    return lambda *args, **kwargs: opened.enter_context(closing(Node(*args, **kwargs)))


@pytest.fixture
def make_wire(opened: ExitStack) -> Callable[[str], Wire]:
    return lambda address: opened.enter_context(closing(Wire(address)))


@pytest.fixture
def node(make_node: Callable[..., Node], family: int) -> Node:
    """Node 1."""
    return make_node(1, family)


@pytest.fixture
def wire(make_wire: Callable[[str], Wire], family: int) -> Wire:
    """The place of node 2."""
    return make_wire(wire_address(2, family))
