from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from forwarder.rtnetlink import (
    Done,
    LinkChange,
    Refused,
    RouteChange,
    ask_route,
    dump_routes,
    messages,
)


def routes(kind: int, **fields: object) -> bytes:
    """A message as pyroute2 writes it."""
    message = rtmsg()
    message["header"]["type"] = kind
    attrs = fields.pop("attrs")
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data)


ROUTE = routes(
    24,
    family=2,
    dst_len=24,
    table=254,
    proto=12,
    type=1,
    attrs=[("RTA_DST", "10.42.2.0"), ("RTA_PRIORITY", 32), ("RTA_GATEWAY", "192.0.2.9"), ("RTA_OIF", 7)],
)


def test_a_route() -> None:
    (route,) = messages(ROUTE)
    assert route == RouteChange(
        added=True,
        table=254,
        protocol=12,
        destination=ip_network("10.42.2.0/24"),
        metric=32,
        link=7,
        gateway=ip_address("192.0.2.9"),
        unicast=True,
    )


def test_a_route_that_went_of_a_large_table() -> None:
    attrs = [("RTA_DST", "fd42::"), ("RTA_TABLE", 1000), ("RTA_OIF", 3)]
    (route,) = messages(routes(25, family=10, dst_len=48, table=252, proto=71, type=6, attrs=attrs))
    assert isinstance(route, RouteChange)
    assert (route.added, route.table, route.unicast, route.gateway) == (False, 1000, False, None)
    assert route.destination == ip_network("fd42::/48")


@pytest.mark.parametrize(("family", "default"), [(2, "0.0.0.0/0"), (10, "::/0")])
def test_a_default_route_has_no_destination(family: int, default: str) -> None:
    (route,) = messages(routes(24, family=family, dst_len=0, table=254, proto=3, type=1, attrs=[]))
    assert isinstance(route, RouteChange)
    assert route.destination == ip_network(default)


def test_several_in_one_receive_and_what_is_not_named() -> None:
    unknown = struct.pack("=IHHII", 20, 99, 0, 0, 0) + bytes(4)
    link = struct.pack("=IHHII", 32, 16, 0, 0, 0) + struct.pack("=BxHiII", 0, 1, 5, 0, 0)
    refused = struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -101)
    done = struct.pack("=IHHIIi", 20, 3, 0, 0, 0, 0)
    found = list(messages(unknown + ROUTE + link + refused + done))
    assert [type(message) for message in found] == [RouteChange, LinkChange, Refused, Done]
    assert found[1:3] == [LinkChange(5), Refused(-101)]


@given(st.binary(max_size=200))
def test_what_is_cut_off_is_left(tail: bytes) -> None:
    """The kernel cuts nothing; a receive with too small a buffer would."""
    header = struct.pack("=IHHII", 16 + len(tail) + 1, 24, 0, 0, 0)
    assert list(messages(ROUTE + header + tail))[:1] == list(messages(ROUTE))
    assert len(list(messages(ROUTE + header + tail))) == 1


def test_the_requests_are_pyroute2s() -> None:
    """Read back by it."""
    asked = rtmsg(ask_route(ip_address("192.0.2.9")))
    asked.decode()
    assert (asked["header"]["type"], asked["dst_len"], asked.get("RTA_DST")) == (26, 32, "192.0.2.9")
    dumped = rtmsg(dump_routes(6, 12))
    dumped.decode()
    assert (dumped["family"], dumped["table"], dumped["proto"]) == (10, 254, 12)
    assert dumped["header"]["flags"] & 0x300 == 0x300
