"""rtnetlink's messages about links, addresses, routes and filters: fields to bytes and back. Pure.

By hand and not by pyroute2, with which this was most of what an ADD computes. What is built here comes after
struct nlmsghdr, and so does what is read.
Sources: linux/rtnetlink.h, if_link.h, if_addr.h, if_bridge.h, veth.h, pkt_sched.h, pkt_cls.h.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from cni.ipam import IpAddress

NEWLINK, DELLINK, GETLINK, NEWADDR, GETADDR, NEWROUTE, GETROUTE = 16, 17, 18, 20, 22, 24, 26
NEWQDISC, NEWTFILTER, GETTFILTER = 36, 44, 46

_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_NESTED, _TYPE = 0x8000, 0x3FFF
_U32 = struct.Struct("=I")

_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_GSO_MAX_SEGS = 18, 20, 28, 29, 40
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA, _VETH_INFO_PEER = 1, 2, 4, 5, 1
_BRPORT_STATE, _BRPORT_MODE, _BRPORT_ISOLATED = 1, 4, 33
_IFF_UP, _BR_STATE_FORWARDING, _SKIP_STATISTICS = 0x1, 3, 1 << 3

_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 1, 2, 0x02

# family, destination's and source's length, tos, table, protocol, scope, type, flags
_RTMSG = struct.Struct("=8BI")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 4, 5, 6
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_UNIVERSE, _SCOPE_LINK, _UNICAST = 254, 4, 0, 253, 1

_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_CLSACT_HANDLE, _CLSACT, _CLSACT_INGRESS = 0xFFFF0000, 0xFFFFFFF1, 0xFFFFFFF2
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _DIRECT_ACTION = 6, 7, 8, 1
_ETH_P_ALL = 0x0003

_ANYWHERE: Final[dict[int, IpAddress]] = {socket.AF_INET: IPv4Address(0), socket.AF_INET6: IPv6Address(0)}


@dataclass(frozen=True)
class Link:
    """One link as the kernel has it. `peer` is the other end's index, `master` the bridge's."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool
    alias: str
    master: int | None
    peer: int | None
    isolated: bool
    forwarding: bool


@dataclass(frozen=True)
class VethEnd:
    """What one end of a veth is born with."""

    name: str
    mac: str
    mtu: int
    gso_max_segs: int | None = None  # None: the kernel's default


@dataclass(frozen=True)
class Route:
    """One unicast route through a link; a default route's `dst` is the unspecified address with length 0."""

    dst: IpAddress
    length: int
    gateway: IpAddress | None = None  # None: on the link itself


def link(name: str, *, up: bool = False) -> bytes:
    """The link of that name, for NEWLINK to set it up, GETLINK or DELLINK."""
    flags = _IFF_UP if up else 0
    return _IFINFOMSG.pack(0, 0, 0, flags, flags) + _text(_IFLA_IFNAME, name)


def link_without_statistics(name: str) -> bytes:
    return link(name) + _u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)


def every_link() -> bytes:
    return _IFINFOMSG.pack(0, 0, 0, 0, 0) + _u32(_IFLA_EXT_MASK, _SKIP_STATISTICS)


def veth(host: VethEnd, pod: VethEnd, pod_netns: int, bridge_index: int) -> bytes:
    """Both ends, each in its namespace with its final name, the host's a port of the bridge."""
    nowhere = _IFINFOMSG.pack(0, 0, 0, 0, 0)
    peer = _attribute(_VETH_INFO_PEER, nowhere + _end(pod) + _u32(_IFLA_NET_NS_FD, pod_netns))
    info = _text(_INFO_KIND, "veth") + _attribute(_INFO_DATA | _NESTED, peer)
    return (
        nowhere + _end(host) + _u32(_IFLA_MASTER, bridge_index) + _attribute(_IFLA_LINKINFO | _NESTED, info)
    )


def changed_link(
    name: str, *, master: int | None = None, mtu: int | None = None, gso_max_segs: int | None = None
) -> bytes:
    """The link of that name, for NEWLINK to give it what is not None."""
    values = {_IFLA_MASTER: master, _IFLA_MTU: mtu, _IFLA_GSO_MAX_SEGS: gso_max_segs}
    return link(name) + b"".join(_u32(kind, value) for kind, value in values.items() if value is not None)


def isolated_port_up(name: str, alias: str) -> bytes:
    port = _attribute(_BRPORT_ISOLATED, b"\1") + _attribute(_BRPORT_MODE, b"\0")
    info = _text(_INFO_SLAVE_KIND, "bridge") + _attribute(_INFO_SLAVE_DATA | _NESTED, port)
    return link(name, up=True) + _text(_IFLA_IFALIAS, alias) + _attribute(_IFLA_LINKINFO | _NESTED, info)


def read_link(message: bytes) -> Link:
    _, _, index, flags, _ = _IFINFOMSG.unpack_from(message)
    found = _attributes(message, _IFINFOMSG.size)
    info = _attributes(found.get(_IFLA_LINKINFO, b""))
    port = _attributes(info.get(_INFO_SLAVE_DATA, b"")) if _string(info, _INFO_SLAVE_KIND) == "bridge" else {}
    return Link(
        index=index,
        name=_string(found, _IFLA_IFNAME),
        kind=_string(info, _INFO_KIND),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(found, _IFLA_MTU) or 0,
        up=bool(flags & _IFF_UP),
        alias=_string(found, _IFLA_IFALIAS),
        master=_number(found, _IFLA_MASTER),
        peer=_number(found, _IFLA_LINK),
        isolated=port.get(_BRPORT_ISOLATED) == b"\1",
        forwarding=port.get(_BRPORT_STATE) == bytes([_BR_STATE_FORWARDING]),
    )


def address(index: int, own: IpAddress) -> bytes:
    """`own` alone (/32 or /128), ready at once: no duplicate address detection."""
    flags = _IFA_F_NODAD if own.version == 6 else 0
    head = _IFADDRMSG.pack(_family(own), own.max_prefixlen, flags, 0, index)
    return head + _attribute(_IFA_LOCAL, own.packed) + _attribute(_IFA_ADDRESS, own.packed)


def addresses_of(index: int) -> bytes:
    return _IFADDRMSG.pack(0, 0, 0, 0, index)


def read_address(message: bytes) -> tuple[int, IpAddress, int]:
    """(link's index, address, prefix length)."""
    _, length, _, _, index = _IFADDRMSG.unpack_from(message)
    found = _attributes(message, _IFADDRMSG.size)
    return index, ip_address(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]), length


def route(index: int, wanted: Route, metric: int) -> bytes:
    scope = _SCOPE_UNIVERSE if wanted.gateway else _SCOPE_LINK
    fixed = (wanted.length, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, _UNICAST, 0)
    body = _RTMSG.pack(_family(wanted.dst), *fixed) + _u32(_RTA_OIF, index) + _u32(_RTA_PRIORITY, metric)
    if wanted.length:
        body += _attribute(_RTA_DST, wanted.dst.packed)
    if wanted.gateway:
        body += _attribute(_RTA_GATEWAY, wanted.gateway.packed)
    return body


def routes_of(index: int, version: int) -> bytes:
    """Those of one IP version."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    return _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + _u32(_RTA_OIF, index)


def read_route(message: bytes) -> tuple[int | None, Route] | None:
    """(link's index, route); None for what is no unicast route of IPv4 or IPv6."""
    family, length, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(message)
    anywhere = _ANYWHERE.get(family)
    if kind != _UNICAST or anywhere is None:
        return None
    found = _attributes(message, _RTMSG.size)
    dst, gateway = found.get(_RTA_DST), found.get(_RTA_GATEWAY)
    made = Route(ip_address(dst) if dst else anywhere, length, ip_address(gateway) if gateway else None)
    return _number(found, _RTA_OIF), made


def clsact(index: int) -> bytes:
    """The qdisc that filters hang on, at link `index`."""
    return _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + _text(_TCA_KIND, "clsact")


def ingress_filter(index: int, program_fd: int, name: str) -> bytes:
    options = (
        _u32(_TCA_BPF_FD, program_fd) + _text(_TCA_BPF_NAME, name) + _u32(_TCA_BPF_FLAGS, _DIRECT_ACTION)
    )
    info = 1 << 16 | socket.htons(_ETH_P_ALL)  # priority, protocol
    head = _TCMSG.pack(0, index, 0, _CLSACT_INGRESS, info)
    return head + _text(_TCA_KIND, "bpf") + _attribute(_TCA_OPTIONS, options)


def ingress_filters_of(index: int) -> bytes:
    return _TCMSG.pack(0, index, 0, _CLSACT_INGRESS, 0)


def read_filter_name(message: bytes) -> str:
    """An eBPF filter's; empty for any other."""
    found = _attributes(message, _TCMSG.size)
    if _string(found, _TCA_KIND) != "bpf":
        return ""
    return _string(_attributes(found.get(_TCA_OPTIONS, b"")), _TCA_BPF_NAME)


def _end(end: VethEnd) -> bytes:
    body = _text(_IFLA_IFNAME, end.name) + _attribute(_IFLA_ADDRESS, bytes.fromhex(end.mac.replace(":", "")))
    body += _u32(_IFLA_MTU, end.mtu)
    return body if end.gso_max_segs is None else body + _u32(_IFLA_GSO_MAX_SEGS, end.gso_max_segs)


def _attribute(kind: int, value: bytes) -> bytes:
    data = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, _U32.pack(value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The values by type. What is cut short is left out."""
    found = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if not _ATTRIBUTE.size <= length <= len(data) - offset:
            break
        found[kind & _TYPE] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + -length % 4
    return found


def _number(found: dict[int, bytes], kind: int) -> int | None:
    value = found.get(kind)
    return None if value is None else int.from_bytes(value, sys.byteorder)


def _string(found: dict[int, bytes], kind: int) -> str:
    return found.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _family(own: IpAddress) -> int:
    return socket.AF_INET if own.version == 4 else socket.AF_INET6
