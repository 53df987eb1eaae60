"""The kernel's links, addresses and routes: one blocking rtnetlink socket. Sole importer of pyroute2.

pyroute2 encodes and decodes; the exchange is ours, because its IPRoute forks a process to open a socket in
another namespace and runs an event loop per thread: 9 ms a namespace against 0.1 ms here.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.ipam import IpAddress

# linux/netlink.h
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_F_REQUEST, _F_ACK, _F_DUMP, _F_EXCL, _F_CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_F_DUMP_INTR, _F_ACK_TLVS = 0x10, 0x200
_NLMSGERR_ATTR_MSG = 1
# linux/rtnetlink.h
_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 16, 17, 18, 20, 22, 24, 26
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_UNIVERSE, _SCOPE_LINK, _UNICAST = 254, 4, 0, 253, 1
_NEWQDISC, _NEWTFILTER, _GETTFILTER = 36, 44, 46
_TCMSG = struct.Struct("=BxxxiIII")  # struct tcmsg: family, ifindex, handle, parent, info
_CLSACT_HANDLE, _CLSACT, _CLSACT_INGRESS = 0xFFFF0000, 0xFFFFFFF1, 0xFFFFFFF2  # linux/pkt_sched.h
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _DIRECT_ACTION = 6, 7, 8, 1  # linux/pkt_cls.h
_ETH_P_ALL = 0x0003
_IFA_F_NODAD = 0x02
_IFF_UP = 0x1
_BR_STATE_FORWARDING = 3
_SKIP_STATISTICS = 1 << 3

_TIMEOUT_S = 10.0
_DUMP_TRIES = 10
_LOOK_AGAIN_S = 0.0003
_RECEIVE_BYTES = 1 << 16  # the kernel's dump messages are at most 32 KiB


class NetlinkError(OSError):
    """The kernel refused; the text is what was asked and the kernel's own reason."""


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


class Netlink:
    """A socket in the network namespace of the thread that makes it; afterwards any one thread may use it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find_link(self, name: str) -> Link | None:
        message = ifinfmsg()
        message["attrs"] = [("IFLA_IFNAME", name), ("IFLA_EXT_MASK", _SKIP_STATISTICS)]
        try:
            found = self._request(_GETLINK, 0, message, f"look up link {name}")
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(found[0])

    def add_veth(self, host: VethEnd, pod: VethEnd, pod_netns: int, bridge_index: int) -> None:
        """Both ends in one request, each in its namespace with its final name; both are down."""
        peer = {"attrs": [*_end_attributes(pod), ("IFLA_NET_NS_FD", pod_netns)]}
        message = ifinfmsg()
        message["attrs"] = [
            *_end_attributes(host),
            ("IFLA_MASTER", bridge_index),
            (
                "IFLA_LINKINFO",
                {
                    "attrs": [
                        ("IFLA_INFO_KIND", "veth"),
                        ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]}),
                    ]
                },
            ),
        ]
        self._change(_NEWLINK, _F_CREATE | _F_EXCL, message, f"create veth {host.name} and {pod.name}")

    def set_port_up(self, name: str, alias: str) -> None:
        """Isolate bridge port `name`, mark it with `alias`, then set it up: in that order, in one request."""
        message = ifinfmsg()
        message["flags"] = message["change"] = _IFF_UP
        port = {"attrs": [("IFLA_BRPORT_ISOLATED", 1), ("IFLA_BRPORT_MODE", 0)]}
        message["attrs"] = [
            ("IFLA_IFNAME", name),
            ("IFLA_IFALIAS", alias),
            (
                "IFLA_LINKINFO",
                {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", port)]},
            ),
        ]
        self._change(_NEWLINK, 0, message, f"set bridge port {name} up")

    def set_up(self, name: str) -> None:
        message = ifinfmsg()
        message["flags"] = message["change"] = _IFF_UP
        message["attrs"] = [("IFLA_IFNAME", name)]
        self._change(_NEWLINK, 0, message, f"set {name} up")

    def wait_forwarding(self, name: str, seconds: float) -> None:
        """Return when the bridge forwards on port `name`. The kernel notices a veth's carrier in a work
        queue of its own, and until then drops what the pod sends. After `seconds` return all the same:
        it will come, and an ADD is not worth undoing for it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            link = self.find_link(name)
            if link is None or link.forwarding:
                return
            time.sleep(_LOOK_AGAIN_S)

    def delete_link(self, name: str) -> None:
        """Delete it; nothing to do when it is gone already."""
        message = ifinfmsg()
        message["attrs"] = [("IFLA_IFNAME", name)]
        try:
            self._change(_DELLINK, 0, message, f"delete {name}")
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    def add_address(self, index: int, address: IpAddress) -> None:
        """`address` alone (/32 or /128), ready at once: no duplicate address detection."""
        message = ifaddrmsg()
        message["family"] = _family(address)
        message["prefixlen"] = address.max_prefixlen
        message["index"] = index
        message["flags"] = _IFA_F_NODAD if address.version == 6 else 0
        message["attrs"] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
        self._change(_NEWADDR, _F_CREATE | _F_EXCL, message, f"add address {address}")

    def addresses(self, index: int) -> frozenset[tuple[IpAddress, int]]:
        """(address, prefix length) of every address of link `index`."""
        message = ifaddrmsg()
        message["index"] = index
        found = set()
        for item in self._request(_GETADDR, _F_DUMP, message, "list addresses"):
            text = item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS")
            if item["index"] == index and text:
                found.add((ip_address(text), item["prefixlen"]))
        return frozenset(found)

    def add_route(self, index: int, route: Route, metric: int = 0) -> bool:
        """Whether it was added: False when there is one to the same destination with the same metric.

        Metric 0 is the kernel's default for the family.
        """
        message = rtmsg()
        message["family"] = _family(route.dst)
        message["dst_len"] = route.length
        message["table"] = _TABLE_MAIN
        message["proto"] = _PROTO_STATIC
        message["scope"] = _SCOPE_UNIVERSE if route.gateway else _SCOPE_LINK
        message["type"] = _UNICAST
        message["attrs"] = [("RTA_OIF", index), ("RTA_PRIORITY", metric)]
        if route.length:
            message["attrs"].append(("RTA_DST", str(route.dst)))
        if route.gateway:
            message["attrs"].append(("RTA_GATEWAY", str(route.gateway)))
        try:
            self._change(_NEWROUTE, _F_CREATE | _F_EXCL, message, f"add route to {route.dst}/{route.length}")
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def routes(self, index: int) -> frozenset[Route]:
        """The unicast routes through link `index`, in every table: a later plugin may have moved them."""
        found = set()
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            message = rtmsg()
            message["family"] = family
            message["attrs"] = [("RTA_OIF", index)]
            for item in self._request(_GETROUTE, _F_DUMP, message, "list routes"):
                if item["type"] == _UNICAST and item.get_attr("RTA_OIF") == index:
                    dst = ip_address(item.get_attr("RTA_DST") or any_address)
                    gateway = item.get_attr("RTA_GATEWAY")
                    found.add(Route(dst, item["dst_len"], ip_address(gateway) if gateway else None))
        return frozenset(found)

    def links(self) -> list[Link]:
        """Every link of the namespace."""
        message = ifinfmsg()
        message["attrs"] = [("IFLA_EXT_MASK", _SKIP_STATISTICS)]
        return [_link(item) for item in self._request(_GETLINK, _F_DUMP, message, "list links")]

    def add_ingress_filter(self, index: int, program_fd: int, name: str) -> None:
        """Let the eBPF program decide over what comes in on link `index`, by a clsact qdisc."""
        qdisc = _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + _attribute(_TCA_KIND, b"clsact\0")
        self._acknowledged(_NEWQDISC, qdisc, f"add a clsact qdisc for {name}")
        options = (
            _attribute(_TCA_BPF_FD, struct.pack("=I", program_fd))
            + _attribute(_TCA_BPF_NAME, name.encode() + b"\0")
            + _attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
        )
        info = 1 << 16 | socket.htons(_ETH_P_ALL)  # priority, protocol
        body = _TCMSG.pack(0, index, 0, _CLSACT_INGRESS, info)
        body += _attribute(_TCA_KIND, b"bpf\0") + _attribute(_TCA_OPTIONS, options)
        self._acknowledged(_NEWTFILTER, body, f"add filter {name}")

    def has_ingress_filter(self, index: int, name: str) -> bool:
        from pyroute2.netlink.rtnl.tcmsg import tcmsg  # only kernels before tcx come here

        body = _TCMSG.pack(0, index, 0, _CLSACT_INGRESS, 0)
        found, _ = self._exchange(_GETTFILTER, _F_REQUEST | _F_DUMP, body, tcmsg, "list filters")
        options = [item.get_attr("TCA_OPTIONS") for item in found]
        return any(option is not None and option.get_attr("TCA_BPF_NAME") == name for option in options)

    def _acknowledged(self, kind: int, body: bytes, what: str) -> None:
        self._exchange(kind, _F_REQUEST | _F_CREATE | _F_EXCL | _F_ACK, body, bytes, what)

    def _change(self, kind: int, flags: int, message: Any, what: str) -> None:
        self._request(kind, flags | _F_ACK, message, what)

    def _request(self, kind: int, flags: int, message: Any, what: str) -> list[Any]:
        """The decoded answers to one request; a dump that the kernel says was interrupted is taken again."""
        message.encode()
        body = bytes(message.data)[_HEADER.size :]
        for _ in range(_DUMP_TRIES):
            answers, interrupted = self._exchange(kind, _F_REQUEST | flags, body, type(message), what)
            if not interrupted:
                return answers
        raise NetlinkError(errno.EAGAIN, f"{what}: interrupted {_DUMP_TRIES} times by other changes")

    def _exchange(
        self, kind: int, flags: int, body: bytes, decoder: type, what: str
    ) -> tuple[list[Any], bool]:
        self._sequence += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        answers: list[Any] = []
        interrupted = False
        while True:
            for answer_kind, answer_flags, sequence, part in self._receive(what):
                if sequence != self._sequence:
                    continue  # left over from a request that timed out
                interrupted |= bool(answer_flags & _F_DUMP_INTR)
                if answer_kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_refusal(answer_kind, answer_flags, part, what)
                    return answers, interrupted
                answer = decoder(part)
                answer.decode()
                answers.append(answer)
                if not flags & (_F_DUMP | _F_ACK):
                    return answers, interrupted

    def _receive(self, what: str) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence, whole message) of each message in one datagram."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise NetlinkError(errno.ETIMEDOUT, f"{what}: no answer in {_TIMEOUT_S:.0f} s") from None
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset : offset + length]
            offset += max(_aligned(length), _HEADER.size)


def delete_and_go_on(name: str) -> None:
    """Delete `name`; return when it and its peer are closed and out of their namespaces.

    The kernel answers only when it has freed them, some RCU grace periods and 10 to 30 ms later. That is
    waited for on another thread, which ends by itself.
    """
    failure: list[BaseException] = []
    netlink = Netlink()

    def delete() -> None:
        with netlink:
            try:
                netlink.delete_link(name)
            except BaseException as error:
                failure.append(error)

    thread = threading.Thread(target=delete, name="delete-link")
    thread.start()
    # This look, unlike one by netlink, does not wait for the lock that the deletion holds.
    while thread.is_alive() and _exists(name):
        time.sleep(_LOOK_AGAIN_S)
    if not thread.is_alive() and failure:
        raise failure[0]


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def ipv6_present() -> bool:
    """Whether this kernel speaks IPv6 at all (booted without ipv6.disable=1)."""
    return Path("/proc/sys/net/ipv6").exists()


def set_link_sysctls(ifname: str, settings: Mapping[str, int]) -> None:
    """Write /proc/sys/net/<family>/conf/<ifname>/<key>, keyed `ipv4.key` or `ipv6.key`, in this thread's
    namespace. A family or key the kernel does not have is left out: there is nothing to be set then."""
    for key, value in settings.items():
        family, _, name = key.partition(".")
        try:
            Path(f"/proc/sys/net/{family}/conf/{ifname}/{name}").write_text(str(value))
        except FileNotFoundError:
            continue


def _end_attributes(end: VethEnd) -> list[tuple[str, Any]]:
    attributes: list[tuple[str, Any]] = [
        ("IFLA_IFNAME", end.name),
        ("IFLA_ADDRESS", end.mac),
        ("IFLA_MTU", end.mtu),
    ]
    if end.gso_max_segs is not None:
        attributes.append(("IFLA_GSO_MAX_SEGS", end.gso_max_segs))
    return attributes


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    port = info.get_attr("IFLA_INFO_SLAVE_DATA") if info else None
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & _IFF_UP),
        alias=message.get_attr("IFLA_IFALIAS") or "",
        master=message.get_attr("IFLA_MASTER"),
        peer=message.get_attr("IFLA_LINK"),
        isolated=bool(port and not isinstance(port, str) and port.get_attr("IFLA_BRPORT_ISOLATED")),
        forwarding=bool(
            port and not isinstance(port, str) and port.get_attr("IFLA_BRPORT_STATE") == _BR_STATE_FORWARDING
        ),
    )


def _raise_refusal(kind: int, flags: int, part: bytes, what: str) -> None:
    """Raise unless the error code (or a dump's closing code) is 0; with the kernel's own words, if any."""
    code = -int.from_bytes(part[_HEADER.size : _HEADER.size + 4], sys.byteorder, signed=True)
    if code <= 0:
        return
    # An error repeats the request's header (and, NETLINK_CAP_ACK, not its body) before its attributes.
    offset = _HEADER.size + 4 + (_HEADER.size if kind == _NLMSG_ERROR else 0)
    reason = ""
    while flags & _F_ACK_TLVS and offset + _ATTRIBUTE.size <= len(part):
        length, attribute = _ATTRIBUTE.unpack_from(part, offset)
        if attribute == _NLMSGERR_ATTR_MSG:
            reason = part[offset + _ATTRIBUTE.size : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += max(_aligned(length), _ATTRIBUTE.size)
    raise NetlinkError(code, f"{what}: {os.strerror(code)}" + (f" ({reason})" if reason else ""))


def _attribute(kind: int, value: bytes) -> bytes:
    data = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return data.ljust(_aligned(len(data)), b"\0")


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _family(address: IpAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
