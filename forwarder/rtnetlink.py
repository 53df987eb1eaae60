"""Routes, links and addresses in the kernel's own words, as far as they are asked for all the time. Pure.

What is set goes by pyroute2 (`links`). To ask it for a route takes 18 times as long, and it drives a loop
of its own; here the event loop asks for each peer, and reads each change of a host's routes.
Sources: linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h; netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final, TypeAlias

from forwarder.addresses import Address, Network

GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE."""

AF_INET, AF_INET6 = 2, 10
TABLE_MAIN: Final = 254

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # rtmsg: family, lengths of dst and src, tos, table, protocol, scope, type, flags
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_U32 = struct.Struct("=I")

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _GETADDR = 16, 17, 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_REQUEST, _DUMP = 0x1, 0x300
_RTN_UNICAST = 1
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 6, 9, 15, 18
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_FAMILY = {4: AF_INET, 6: AF_INET6}
_ANY = {AF_INET: "0.0.0.0", AF_INET6: "::"}


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route that is there, as in a dump or an answer, or that came or went. `link` is an index; None of
    several next hops."""

    added: bool
    table: int
    protocol: int
    destination: Network
    metric: int
    link: int | None
    gateway: Address | None
    unicast: bool


@dataclass(frozen=True, slots=True)
class LinkChange:
    """Something about a link or its addresses. `address` is one that is there, as in a dump."""

    link: int
    address: Address | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a request, if it is a negative errno; 0 is an acknowledgement."""

    code: int


@dataclass(frozen=True, slots=True)
class Done:
    """A dump's end."""


Message: TypeAlias = RouteChange | LinkChange | Refused | Done


def ask_route(destination: Address) -> bytes:
    """The request for the route that a packet to the address would take."""
    family = _FAMILY[destination.version]
    body = _ROUTE.pack(family, destination.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    return _request(_GETROUTE, _REQUEST, body + _attribute(_RTA_DST, destination.packed))


def dump_routes(version: int, protocol: int) -> bytes:
    """The request for the main table's routes of a protocol; the kernel heeds table and protocol where
    NETLINK_GET_STRICT_CHK is set."""
    return _request(
        _GETROUTE, _REQUEST | _DUMP, _ROUTE.pack(_FAMILY[version], 0, 0, 0, TABLE_MAIN, protocol, 0, 0, 0)
    )


def dump_addresses(version: int) -> bytes:
    return _request(_GETADDR, _REQUEST | _DUMP, _ADDRESS.pack(_FAMILY[version], 0, 0, 0, 0))


def messages(data: bytes) -> Iterator[Message]:
    """Those in what one receive gave that are of a kind named here."""
    for kind, body, whole in split(data):
        if not whole:
            return
        if kind in (_NEWROUTE, _DELROUTE):
            yield _route(body, added=kind == _NEWROUTE)
        elif kind in (_NEWLINK, _DELLINK):
            yield LinkChange(_LINK.unpack_from(body)[2])
        elif kind in (_NEWADDR, _DELADDR):
            yield _address(body)
        elif kind == _NLMSG_ERROR:
            yield Refused(_ERROR.unpack_from(body)[0])
        elif kind == _NLMSG_DONE:
            yield Done()


def split(data: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Type and body of each message in what one receive gave, and whether the body is whole."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, data[offset + _HEADER.size : offset + length], length <= len(data) - offset
        offset += (length + 3) & ~3


def _request(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def _attributes(body: bytes, offset: int) -> dict[int, bytes]:
    found = {}
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _route(body: bytes, *, added: bool) -> RouteChange:
    family, length, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(body)
    found = _attributes(body, _ROUTE.size)
    destination = ip_address(found[_RTA_DST]) if _RTA_DST in found else _ANY.get(family, "::")
    return RouteChange(
        added=added,
        table=_number(found, _RTA_TABLE) or table,
        protocol=protocol,
        destination=ip_network((destination, length)),
        metric=_number(found, _RTA_PRIORITY) or 0,
        link=_number(found, _RTA_OIF),
        gateway=_gateway(found),
        unicast=kind == _RTN_UNICAST,
    )


def _gateway(found: dict[int, bytes]) -> Address | None:
    if _RTA_GATEWAY in found:
        return ip_address(found[_RTA_GATEWAY])
    if _RTA_VIA in found:
        return ip_address(found[_RTA_VIA][2:])  # struct rtvia: its family first
    return None


def _address(body: bytes) -> LinkChange:
    found = _attributes(body, _ADDRESS.size)
    address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    return LinkChange(_ADDRESS.unpack_from(body)[4], ip_address(address) if address else None)


def _number(found: dict[int, bytes], kind: int) -> int | None:
    return _U32.unpack(found[kind])[0] if kind in found else None
