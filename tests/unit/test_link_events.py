"""Which of the kernel's messages make us look. The messages are built here, by linux/rtnetlink.h."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.link_events import concerns

ROUTER = bytes.fromhex("02706c000001")
GATEWAY = bytes([169, 254, 71, 1])
MARKS = (ROUTER, GATEWAY)
OURS, STATIC = 71, 4
NEWLINK, DELLINK, NEWADDR, DELADDR, NEWROUTE, DELROUTE, NEWNEIGH, DELNEIGH = 16, 17, 20, 21, 24, 25, 28, 29
NEWQDISC = 36


def message(kind: int, body: bytes = b"") -> bytes:
    length = 16 + len(body)
    return struct.pack("=IHHII", length, kind, 0, 0, 0) + body + bytes(-length % 4)


def route(length: int, protocol: int) -> bytes:
    return struct.pack("=BBBBBBBBI", 2, length, 0, 0, 254, protocol, 0, 1, 0)


def neighbour(value: bytes) -> bytes:
    return struct.pack("=BBHiHBB", 2, 0, 0, 5, 0x80, 0, 1) + struct.pack("=HH", 4 + len(value), 1) + value


CASES: dict[str, tuple[bytes, bool]] = {
    "a link": (message(NEWLINK, bytes(16)), True),
    "a link that goes": (message(DELLINK, bytes(16)), True),
    "an address": (message(NEWADDR, bytes(8)), True),
    "an address that goes": (message(DELADDR, bytes(8)), True),
    "our route goes": (message(DELROUTE, route(16, OURS)), True),
    "our route comes": (message(NEWROUTE, route(16, OURS)), False),
    "another's route goes": (message(DELROUTE, route(16, STATIC)), False),
    "a default route": (message(NEWROUTE, route(0, STATIC)), True),
    "a default route goes": (message(DELROUTE, route(0, STATIC)), True),
    "the virtual router's neighbour": (message(DELNEIGH, neighbour(GATEWAY)), True),
    "the router's forwarding entry": (message(NEWNEIGH, neighbour(ROUTER)), True),
    "a pod's neighbour": (message(NEWNEIGH, neighbour(bytes([10, 42, 1, 2]))), False),
    "something else": (message(NEWQDISC, bytes(20)), False),
    "a route cut short": (message(DELROUTE, b"\2\0"), False),
    "the second of two": (message(NEWQDISC, bytes(19)) + message(NEWLINK, bytes(16)), True),
    "no length": (bytes(16) + message(NEWLINK), False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("datagram", "expected"), CASES.values(), ids=CASES)
def test_what_concerns_us(datagram: bytes, expected: bool) -> None:
    assert concerns(datagram, MARKS) is expected


@given(st.binary(max_size=200))
def test_anything_is_read(datagram: bytes) -> None:
    concerns(datagram, MARKS)
