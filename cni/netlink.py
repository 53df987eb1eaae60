"""The kernel's links, addresses and routes: one blocking socket that speaks `cni.rtnetlink`."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cni import rtnetlink
from cni.ipam import IpAddress
from cni.rtnetlink import Link, Route, VethEnd

__all__ = ["Link", "Netlink", "NetlinkError", "Route", "VethEnd"]

# linux/netlink.h
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_F_REQUEST, _F_ACK, _F_DUMP, _F_EXCL, _F_CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_F_DUMP_INTR, _F_ACK_TLVS = 0x10, 0x200
_NLMSGERR_ATTR_MSG = 1

_TIMEOUT_S = 10.0
_DUMP_TRIES = 10
_LOOK_AGAIN_S = 0.0003
_RECEIVE_BYTES = 1 << 16  # the kernel's dump messages are at most 32 KiB


class NetlinkError(OSError):
    """The kernel refused; the text is what was asked and the kernel's own reason."""


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
        try:
            found = self._ask(
                rtnetlink.GETLINK, rtnetlink.link_without_statistics(name), f"look up link {name}"
            )
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return rtnetlink.read_link(found[0])

    def add_veth(self, host: VethEnd, pod: VethEnd, pod_netns: int, bridge_index: int) -> None:
        """Both ends in one request, each in its namespace with its final name; both are down."""
        body = rtnetlink.veth(host, pod, pod_netns, bridge_index)
        self._create(rtnetlink.NEWLINK, body, f"create veth {host.name} and {pod.name}")

    def set_port_up(self, name: str, alias: str) -> None:
        """Isolate bridge port `name`, mark it with `alias`, then set it up: in that order, in one request."""
        body = rtnetlink.isolated_port_up(name, alias)
        self._change(rtnetlink.NEWLINK, body, f"set bridge port {name} up")

    def set_link(
        self, name: str, *, master: int | None = None, mtu: int | None = None, gso_max_segs: int | None = None
    ) -> None:
        """Give link `name` another bridge (its index), or another size; what is None stays."""
        body = rtnetlink.changed_link(name, master=master, mtu=mtu, gso_max_segs=gso_max_segs)
        self._change(rtnetlink.NEWLINK, body, f"change link {name}")

    def set_up(self, name: str) -> None:
        self._change(rtnetlink.NEWLINK, rtnetlink.link(name, up=True), f"set {name} up")

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
        try:
            self._change(rtnetlink.DELLINK, rtnetlink.link(name), f"delete {name}")
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    def add_address(self, index: int, address: IpAddress) -> None:
        """`address` alone (/32 or /128), ready at once: no duplicate address detection."""
        self._create(rtnetlink.NEWADDR, rtnetlink.address(index, address), f"add address {address}")

    def addresses(self, index: int) -> frozenset[tuple[IpAddress, int]]:
        """(address, prefix length) of every address of link `index`."""
        dumped = self._dump(rtnetlink.GETADDR, rtnetlink.addresses_of(index), "list addresses")
        found = map(rtnetlink.read_address, dumped)
        return frozenset((address, length) for owner, address, length in found if owner == index)

    def add_route(self, index: int, route: Route, metric: int = 0) -> bool:
        """Whether it was added: False when there is one to the same destination with the same metric.

        Metric 0 is the kernel's default for the family.
        """
        body = rtnetlink.route(index, route, metric)
        try:
            self._create(rtnetlink.NEWROUTE, body, f"add route to {route.dst}/{route.length}")
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def routes(self, index: int) -> frozenset[Route]:
        """The unicast routes through link `index`, in every table: a later plugin may have moved them."""
        found = set()
        for version in (4, 6) if ipv6_present() else (4,):
            dumped = self._dump(rtnetlink.GETROUTE, rtnetlink.routes_of(index, version), "list routes")
            for owner, route in filter(None, map(rtnetlink.read_route, dumped)):
                if owner == index:
                    found.add(route)
        return frozenset(found)

    def links(self) -> list[Link]:
        """Every link of the namespace."""
        dumped = self._dump(rtnetlink.GETLINK, rtnetlink.every_link(), "list links")
        return list(map(rtnetlink.read_link, dumped))

    def add_ingress_filter(self, index: int, program_fd: int, name: str) -> None:
        """Let the eBPF program decide over what comes in on link `index`, by a clsact qdisc."""
        self._create(rtnetlink.NEWQDISC, rtnetlink.clsact(index), f"add a clsact qdisc for {name}")
        body = rtnetlink.ingress_filter(index, program_fd, name)
        self._create(rtnetlink.NEWTFILTER, body, f"add filter {name}")

    def has_ingress_filter(self, index: int, name: str) -> bool:
        dumped = self._dump(rtnetlink.GETTFILTER, rtnetlink.ingress_filters_of(index), "list filters")
        return name in map(rtnetlink.read_filter_name, dumped)

    def _create(self, kind: int, body: bytes, what: str) -> None:
        self._exchange(kind, _F_ACK | _F_CREATE | _F_EXCL, body, what)

    def _change(self, kind: int, body: bytes, what: str) -> None:
        self._exchange(kind, _F_ACK, body, what)

    def _ask(self, kind: int, body: bytes, what: str) -> list[bytes]:
        return self._exchange(kind, 0, body, what)[0]

    def _dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """All there is; taken again when the kernel says that it changed meanwhile."""
        for _ in range(_DUMP_TRIES):
            answers, interrupted = self._exchange(kind, _F_DUMP, body, what)
            if not interrupted:
                return answers
        raise NetlinkError(errno.EAGAIN, f"{what}: interrupted {_DUMP_TRIES} times by other changes")

    def _exchange(self, kind: int, flags: int, body: bytes, what: str) -> tuple[list[bytes], bool]:
        """(the answers, each without its header, whether the kernel says that they do not fit together)."""
        self._sequence += 1
        head = _HEADER.pack(_HEADER.size + len(body), kind, _F_REQUEST | flags, self._sequence, 0)
        self._socket.send(head + body)
        answers: list[bytes] = []
        interrupted = False
        while True:
            for answer_kind, answer_flags, sequence, part in self._receive(what):
                if sequence != self._sequence:
                    continue  # left over from a request that timed out
                interrupted |= bool(answer_flags & _F_DUMP_INTR)
                if answer_kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_refusal(answer_kind, answer_flags, part, what)
                    return answers, interrupted
                answers.append(part[_HEADER.size :])
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


def _aligned(length: int) -> int:
    return (length + 3) & ~3
