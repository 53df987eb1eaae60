"""Pings, TCP transfers and UDP echoes between namespaces, over plain sockets opened inside them.

Sockets stay in the namespace they were opened in, so one process speaks for every pod.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwarder.demo import netns

PING_SECONDS = 3.0
STALL_SECONDS = 5.0
"""A TCP transfer that does not move for so long has failed."""
ECHO_SECONDS = 2.0

_SOL_RAW, _ICMP_FILTER = 255, 1  # linux/in.h, linux/icmp.h
_ICMPV6_FILTER = 1  # linux/icmpv6.h
_ICMP_ECHO, _ICMP_ECHO_REPLY = 8, 0  # RFC 792
_ICMPV6_ECHO, _ICMPV6_ECHO_REPLY = 128, 129  # RFC 4443 section 4
_ECHO = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number


@dataclass(frozen=True)
class Station:
    """Somebody to talk from or to: a pod, or a node's own stack."""

    name: str
    namespace: Path
    ips: tuple[str, ...]

    def address(self, family: socket.AddressFamily) -> str | None:
        return next((ip for ip in self.ips if family_of(ip) == family), None)


@dataclass(frozen=True)
class Pings:
    sent: int
    received: int
    median_seconds: float
    lost: tuple[str, ...]
    """"p1 -> p2 10.71.2.3" for each echo that did not come back."""


@dataclass(frozen=True)
class Transfer:
    source: str
    destination: str
    address: str
    bytes: int
    seconds: float
    hash_ok: bool

    @property
    def gbps(self) -> float:
        return self.bytes * 8 / self.seconds / 1e9


@dataclass(frozen=True)
class Echoes:
    sent: int
    received: int
    fault: str | None
    """Between whom and what went wrong, if anything did."""


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def ping(pairs: Iterable[tuple[Station, Station]], seconds: float = PING_SECONDS) -> Pings:
    """One ICMP echo for each pair and each address of the destination, all under way at once."""
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        sockets: dict[tuple[Path, int], socket.socket] = {}
        waiting: dict[tuple[str, int, int], tuple[str, float]] = {}
        unsent: list[str] = []
        round_trips: list[float] = []
        sent = 0

        def collect(timeout: float) -> None:
            for key, _ in selector.select(timeout):
                asked = waiting.pop(_receive_reply(key.fileobj), None)  # type: ignore[arg-type]
                if asked is not None:
                    round_trips.append(time.monotonic() - asked[1])

        for source, destination in pairs:
            for address in destination.ips:
                at = (source.namespace, family_of(address))
                if at not in sockets:
                    sockets[at] = stack.enter_context(_open_icmp(*at))
                    selector.register(sockets[at], selectors.EVENT_READ)
                # From 1: a reply of nothing but zeros is one whose checksum Linux gets wrong.
                identifier, sequence = 1 + (sent >> 16), sent & 0xFFFF
                sent += 1
                what = f"{source.name} -> {destination.name} {address}"
                when = time.monotonic()
                try:
                    sockets[at].sendto(_echo_request(at[1], identifier, sequence), (address, 0))
                except OSError as error:  # no route, for one: a lost ping, and the reason is worth telling
                    unsent.append(f"{what}: {error.strerror}")
                else:
                    waiting[address, identifier, sequence] = what, when
                collect(0)
        deadline = time.monotonic() + seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            collect(left)
    lost = (*unsent, *(what for what, _ in waiting.values()))
    return Pings(sent, sent - len(lost), statistics.median(round_trips) if round_trips else 0.0, lost)


def transfer(source: Station, destination: Station, address: str, payload: bytes) -> Transfer:
    """Send the payload over TCP; the receiver hashes what came. The time is from connect to last byte."""
    family = family_of(address)
    with (
        netns.open_socket(destination.namespace, family, socket.SOCK_STREAM) as listener,
        netns.open_socket(source.namespace, family, socket.SOCK_STREAM) as client,
    ):
        listener.settimeout(STALL_SECONDS)
        listener.bind((address, 0))
        listener.listen(1)
        sender = threading.Thread(target=_send, args=(client, listener.getsockname(), payload), daemon=True)
        began = time.monotonic()
        sender.start()
        received = _receive(listener, len(payload))
        seconds = time.monotonic() - began
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)  # ends a send that waits for a receiver that gave up
        sender.join(STALL_SECONDS)
    same = hashlib.sha256(received).digest() == hashlib.sha256(payload).digest()
    return Transfer(source.name, destination.name, address, len(received), seconds, same)


def udp_echo(source: Station, destination: Station, address: str, size: int, count: int) -> Echoes:
    """`count` datagrams of `size` bytes, one after the other, echoed by the destination. One that is lost
    ends it: the others would take as long to fail."""
    family = family_of(address)
    with (
        netns.open_socket(destination.namespace, family, socket.SOCK_DGRAM) as server,
        netns.open_socket(source.namespace, family, socket.SOCK_DGRAM) as client,
    ):
        for end in (server, client):
            end.settimeout(ECHO_SECONDS)
        server.bind((address, 0))
        for number in range(count):
            payload = os.urandom(size)
            try:
                client.sendto(payload, server.getsockname())
                question, asker = server.recvfrom(size + 1)
                server.sendto(question, asker)
                answer = client.recv(size + 1)
            except OSError as error:
                return Echoes(count, number, f"{source.name} -> {destination.name} {address}: {error}")
            if answer != payload:
                return Echoes(
                    count, number, f"{source.name} -> {destination.name} {address}: came back changed"
                )
    return Echoes(count, count, None)


def _send(client: socket.socket, address: tuple[Any, ...], payload: bytes) -> None:
    with suppress(OSError):  # the receiver counts what is missing
        client.settimeout(STALL_SECONDS)
        client.connect(address)
        client.settimeout(None)  # a deadline would be one for the whole payload
        client.sendall(payload)
        client.shutdown(socket.SHUT_WR)


def _receive(listener: socket.socket, size: int) -> memoryview:
    """What came of `size` bytes before the sender ended or stalled."""
    received, count = memoryview(bytearray(size)), 0
    with suppress(OSError):
        server, _ = listener.accept()
        with server:
            server.settimeout(STALL_SECONDS)
            while count < size and (n := server.recv_into(received[count:])) > 0:
                count += n
    return received[:count]


def _open_icmp(namespace: Path, family: int) -> socket.socket:
    """A raw socket that sees echo replies only. (A datagram ICMP socket would need a sysctl in the pod.)"""
    if family == socket.AF_INET:
        opened = netns.open_socket(namespace, family, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        opened.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _ICMP_ECHO_REPLY) & 0xFFFFFFFF))
    else:
        opened = netns.open_socket(namespace, family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        blocked = [0xFFFFFFFF] * 8
        blocked[_ICMPV6_ECHO_REPLY // 32] &= ~(1 << _ICMPV6_ECHO_REPLY % 32)
        opened.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, struct.pack("=8I", *blocked))
    return opened


def _echo_request(family: int, identifier: int, sequence: int) -> bytes:
    kind = _ICMP_ECHO if family == socket.AF_INET else _ICMPV6_ECHO
    message = _ECHO.pack(kind, 0, 0, identifier, sequence)
    if family == socket.AF_INET6:
        return message  # the kernel fills in ICMPv6's checksum (RFC 3542 section 3.1), and not ICMP's
    total = sum(struct.unpack("!4H", message))
    total = (total & 0xFFFF) + (total >> 16)
    return _ECHO.pack(kind, 0, ~total & 0xFFFF, identifier, sequence)


def _receive_reply(icmp: socket.socket) -> tuple[str, int, int]:
    packet, sender = icmp.recvfrom(65535)
    start = (packet[0] & 0x0F) * 4 if icmp.family == socket.AF_INET else 0
    _, _, _, identifier, sequence = _ECHO.unpack_from(packet, start)
    return sender[0], identifier, sequence
