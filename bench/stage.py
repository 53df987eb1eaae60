"""A node without root: a pump between an AF_UNIX seqpacket pair in the TAP's place, which keeps frame
boundaries as a TAP does, and UDP sockets on loopback."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable

from fastpath.kernel.tap import VNET_HEADER_SIZE
from fastpath.kernel.udp import open_receiver, open_sender
from fastpath.pump import Pump
from fastpath.table import LOCAL_SLOT, PeerTable, PrefixTable

VNI = 71
PREFIXES = {1: (("10.1.0.0", 16), ("fd01::", 32)), 2: (("10.2.0.0", 16), ("fd02::", 32))}
NO_OFFLOAD = bytes(VNET_HEADER_SIZE)
WAIT_MILLISECONDS = 2000

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_TAP_BUFFER_BYTES = 8 << 20


class Node:
    """Node 1 or 2. `tap` is the far end of its TAP: what is sent to it, pods have sent."""

    def __init__(self, number: int, encapsulation: str = "geneve", mtu: int = 1450, gro: bool = True) -> None:
        self.router_mac = bytes((2, 0, 0, 0, 1, number))
        self.gateway_mac = bytes((2, 0, 0, 0, 2, number))
        self.address = f"127.0.71.{number}"
        self.tap, self._pump_tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tap, self._pump_tap):
            end.setblocking(False)
            _grow(end)
        self._number, self._encapsulation, self._mtu = number, encapsulation, mtu
        self._prefixes, self._peers = PrefixTable(), PeerTable()
        self.pump = Pump(
            tap_fd=self._pump_tap.fileno(),
            vnet_header_size=VNET_HEADER_SIZE,
            router_mac=self.router_mac,
            gateway_mac=self.gateway_mac,
            vni=VNI,
            prefixes=self._prefixes,
            peers=self._peers,
            mtu=mtu,
        )
        for name in ("udp_segment", "merge_tcp", "merge_udp"):
            self.pump.set_offload(name, True)
        self.receiver = open_receiver(self.address, 0, gro=gro)
        self._sender = open_sender(self.address)
        self.pump.add_receiver(self.receiver, encapsulation)
        self.pump.add_sender(self._sender, socket.AF_INET)
        self._insert(number, LOCAL_SLOT)

    def _insert(self, number: int, slot: int) -> None:
        for address, length in PREFIXES[number]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._prefixes.insert(socket.inet_pton(family, address), length, slot)

    def join(self, other: Node, partial_checksums: bool = False) -> None:
        """Make the other node our peer."""
        endpoint = socket.inet_aton(other.address)
        self._peers.set(
            1,
            encapsulation=self._encapsulation,
            vni=VNI,
            router_mac=other.router_mac,
            endpoint=endpoint,
            port=port_of(other.receiver),
            mtu=self._mtu,
            partial_checksums=partial_checksums,
        )
        self._peers.allow_source(endpoint, 1)
        self._insert(other._number, 1)

    def close(self) -> None:
        for fd in (self.receiver, self._sender):
            os.close(fd)
        self.tap.close()
        self._pump_tap.close()

    def pods_send(self, messages: Iterable[bytes]) -> None:
        """Each message is a virtio_net_hdr and a frame."""
        for message in messages:
            self.tap.send(message)

    def pods_get(self) -> int:
        """Take what was delivered: how many frames."""
        return drain(self.tap.fileno())

    def decap_waiting(self) -> None:
        """Decap every datagram that is there."""
        while self.pump.decap(self.receiver):
            pass

    def forwarded(self, direction: str) -> int:
        """Packets so far."""
        return self.pump.counters()[direction]["forwarded"]


def port_of(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return int(sock.getsockname()[1])


def drain(fd: int) -> int:
    """Read a non-blocking descriptor empty: how many messages there were."""
    count = 0
    buffer = bytearray(1 << 17)
    while True:
        try:
            os.readv(fd, [buffer])
        except BlockingIOError:
            return count
        count += 1


def wait_readable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(WAIT_MILLISECONDS), f"nothing came to descriptor {fd}"


def _grow(end: socket.socket) -> None:
    """A buffer for a batch of superframes; without root as far as the system allows."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _TAP_BUFFER_BYTES)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _TAP_BUFFER_BYTES)
