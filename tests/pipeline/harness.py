"""Nodes without root: a seqpacket pair stands in for each TAP, real UDP sockets on loopback for the wire.

A seqpacket pair keeps frame boundaries, cuts a frame to a short buffer and fills up, as a TAP does. What it
lacks (offload negotiation, EINVAL for a bad virtio header) is tested with real TAPs.
"""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from fastpath.kernel.tap import VNET_HEADER_SIZE
from fastpath.kernel.udp import open_receiver, open_sender
from fastpath.pump import Pump
from fastpath.table import LOCAL_SLOT, PeerTable, PrefixTable
from tests.packets import build
from tests.reference import journeys
from tests.reference.table import PrefixDict

DEADLINE_SECONDS = 5.0
VNI = 0x00ABCD
POD_MTU = 1_450
ENCAPSULATIONS = ("geneve", "vxlan")

# Node n's pods live in 10.n.0.0/24 and fd00:n::/64.
PODS4, PODS6 = "10.{}.0.0/24", "fd00:{}::/64"


def pod(node: int, family: int, host: int = 2) -> str:
    return f"10.{node}.0.{host}" if family == 4 else f"fd00:{node}::{host:x}"


def router_mac(node: int) -> bytes:
    return bytes([2, 0, 0, 0, 1, node])


def gateway_mac(node: int) -> bytes:
    return bytes([2, 0, 0, 0, 2, node])


def wire_address(node: int, family: int) -> str:
    """Loopback has a whole IPv4 /8, but one IPv6 address."""
    return f"127.0.71.{node}" if family == 4 else "::1"


def wait_readable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(DEADLINE_SECONDS * 1_000), f"nothing to read on descriptor {fd}"


@dataclass
class Node:
    """One pump with its TAP, sockets and tables, and the same facts for the oracle.

    `tap` is the far end of the TAP: what is sent to it, pods have sent; what is received, pods would get.
    """

    number: int
    family: int
    vnet_header_size: int = VNET_HEADER_SIZE
    vxlan_reserved_bits: str = "strict"
    mtu: int = 65_535
    senders: int = 4
    gro: bool = True
    sockets: list[int] = field(default_factory=list)
    receivers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tap, self.pump_tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tap, self.pump_tap):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.address = wire_address(self.number, self.family)
        self.prefixes, self.peers = PrefixTable(), PeerTable()
        self.oracle = journeys.Node(
            router_mac=router_mac(self.number),
            gateway_mac=gateway_mac(self.number),
            vni=VNI,
            prefixes=PrefixDict(),
            peers={},
            sources={},
            vxlan_strict=self.vxlan_reserved_bits == "strict",
        )
        self.pump = Pump(
            tap_fd=self.pump_tap.fileno(),
            vnet_header_size=self.vnet_header_size,
            router_mac=self.oracle.router_mac,
            gateway_mac=self.oracle.gateway_mac,
            vni=VNI,
            prefixes=self.prefixes,
            peers=self.peers,
            vxlan_reserved_bits=self.vxlan_reserved_bits,
            mtu=self.mtu,
        )
        for encapsulation in ENCAPSULATIONS:
            self.receivers[encapsulation] = self._own(open_receiver(self.address, 0, gro=self.gro))
            self.pump.add_receiver(self.receivers[encapsulation], encapsulation)
        family = socket.AF_INET if self.family == 4 else socket.AF_INET6
        for _ in range(self.senders):
            self.pump.add_sender(self._own(open_sender(self.address)), family)
        for pods in (PODS4, PODS6):
            self.insert(pods.format(self.number), LOCAL_SLOT)

    def _own(self, fd: int) -> int:
        self.sockets.append(fd)
        return fd

    def close(self) -> None:
        self.tap.close()
        self.pump_tap.close()
        while self.sockets:
            os.close(self.sockets.pop())

    def insert(self, prefix: str, slot: int) -> None:
        network = ip_network(prefix)
        for table in (self.prefixes, self.oracle.prefixes):
            table.insert(network.network_address.packed, network.prefixlen, slot)

    def port(self, encapsulation: str) -> int:
        with socket.socket(fileno=os.dup(self.receivers[encapsulation])) as sock:
            return int(sock.getsockname()[1])

    def add_peer(
        self,
        slot: int,
        node: int,
        port: int,
        *,
        encapsulation: str = "geneve",
        mtu: int = POD_MTU,
        address: str | None = None,
        vni: int = VNI,
    ) -> None:
        """Fill `slot` with node `node`, its pods' prefixes and the outer address it sends from."""
        outer = ip_address(address or wire_address(node, self.family)).packed
        self.peers.set(
            slot,
            encapsulation=encapsulation,
            vni=vni,
            router_mac=router_mac(node),
            endpoint=outer,
            port=port,
            mtu=mtu,
        )
        self.peers.allow_source(outer, slot)
        self.oracle.peers[slot] = journeys.Peer(encapsulation, vni, router_mac(node), mtu)
        self.oracle.sources[outer] = slot
        for pods in (PODS4, PODS6):
            self.insert(pods.format(node), slot)

    # pods' side ---------------------------------------------------------------------------------

    def frame(self, packet: bytes, *, padding: bytes = b"", ethertype: int | None = None) -> bytes:
        """The packet as the host's stack sends it to the virtual router."""
        return build.frame(
            packet,
            destination=router_mac(self.number),
            source=gateway_mac(self.number),
            padding=padding,
            ethertype=ethertype,
        )

    def virtio(self, **fields: int) -> bytes:
        return build.virtio(size=self.vnet_header_size, **fields)

    def pods_send(self, frame: bytes, virtio: bytes | None = None) -> None:
        self.tap.send((self.virtio() if virtio is None else virtio) + frame)

    def pods_get(self) -> list[bytes]:
        """Frames delivered so far; each must have come behind a header that asks for nothing."""
        frames: list[bytes] = []
        while True:
            try:
                message = self.tap.recv(1 << 17)
            except BlockingIOError:
                return frames
            assert message[: self.vnet_header_size] == bytes(self.vnet_header_size)
            frames.append(message[self.vnet_header_size :])

    # wire's side --------------------------------------------------------------------------------

    def decap(self, encapsulation: str, expected: int = 1) -> None:
        """Run decap until `expected` more datagrams were received."""
        until = self.received("decap") + expected
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.received("decap") < until:
            assert time.monotonic() < deadline, f"{until - self.received('decap')} datagrams never came"
            wait_readable(self.receivers[encapsulation])
            self.pump.decap(self.receivers[encapsulation])

    # counters -----------------------------------------------------------------------------------

    def received(self, direction: str) -> int:
        return self.pump.counters()[direction]["received"]

    def forwarded(self, direction: str) -> int:
        return self.pump.counters()[direction]["forwarded"]

    def dropped(self, direction: str) -> dict[str, int]:
        """Reasons that were counted, by name, and how often."""
        return {reason: count for reason, count in self.pump.drops()[direction].items() if count}

    def assert_counters_close(self) -> None:
        """Every frame and datagram was forwarded or dropped, once."""
        for direction in ("encap", "decap"):
            accounted = self.forwarded(direction) + sum(self.dropped(direction).values())
            assert self.received(direction) == accounted, direction


def join(one: Node, other: Node, encapsulation: str, mtu: int = POD_MTU) -> None:
    """Make each node slot 1 of the other."""
    for here, there in ((one, other), (other, one)):
        here.add_peer(1, there.number, there.port(encapsulation), encapsulation=encapsulation, mtu=mtu)


@dataclass(frozen=True)
class Datagram:
    payload: bytes
    source_port: int
    tos: int


class Wire:
    """A peer that is a plain UDP socket: reads what a pump sends, sends what no pump would."""

    def __init__(self, address: str) -> None:
        self.is_ipv6 = ":" in address
        self.socket = socket.socket(socket.AF_INET6 if self.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        if self.is_ipv6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind((address, 0))
        self.port = int(self.socket.getsockname()[1])

    def close(self) -> None:
        self.socket.close()

    def set_tos(self, tos: int) -> None:
        """The outer ToS or Traffic Class of what is sent from now on."""
        if self.is_ipv6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        else:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)

    def send(self, payload: bytes, address: str, port: int, tos: int = 0) -> None:
        self.set_tos(tos)
        self.socket.sendto(payload, (address, port))

    def get(self, expected: int = 1) -> list[Datagram]:
        """Wait for `expected` datagrams, then take all there are."""
        datagrams: list[Datagram] = []
        while len(datagrams) < expected:
            wait_readable(self.socket.fileno())
            datagrams += self.get_now()
        return datagrams

    def get_now(self) -> list[Datagram]:
        datagrams: list[Datagram] = []
        while True:
            try:
                payload, control, _, source = self.socket.recvmsg(1 << 16, 64)
            except BlockingIOError:
                return datagrams
            tos = int.from_bytes(control[0][2], "little") if control else 0
            datagrams.append(Datagram(payload, int(source[1]), tos))
