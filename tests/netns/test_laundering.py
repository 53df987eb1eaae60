"""A packet that was corrupted before its tunnel stays corrupt: the pod's stack refuses it, merged as its
neighbours may be. The peer is this test, speaking Geneve and TCP by hand, to a real node and a real pod."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from forwarder.control.client import ask
from forwarder.demo import netns
from forwarder.demo.lab import VNI, Host, PeerRecord, Pod
from tests.netns.labs import new_lab
from tests.packets import build
from tests.packets.transport import ACK, SYN, UDP, Packet

pytestmark = pytest.mark.root

PORT = 6081
SECONDS = 5.0
UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
SIZE, COUNT = 1_000, 10
PIECES = [bytes([0x41 + number]) * SIZE for number in range(COUNT)]


@dataclass(frozen=True)
class Peer:
    """A host on the wire that the node takes for a node."""

    host: Host
    wire: socket.socket
    pod: Pod
    address: str
    """The pod's, in the family of the test."""

    @property
    def packet(self) -> Packet:
        prefix = next(one for one in self.host.prefixes if one.version == (6 if ":" in self.address else 4))
        macs = build.mac(self.pod.node.router_mac) + build.mac(self.host.router_mac)
        return Packet(str(prefix[2]), self.address, ethernet=macs, source_port=40_000 + prefix.version)

    def send(self, frames: list[bytes]) -> None:
        """All in one train: of one length, in one datagram to a receiver with UDP_GRO."""
        datagrams = [build.geneve(VNI) + frame for frame in frames]
        size = [(socket.IPPROTO_UDP, UDP_SEGMENT, len(datagrams[0]).to_bytes(2, "little"))]
        endpoint = (self.pod.node.underlay["ipv4"], PORT)
        self.wire.sendmsg([b"".join(datagrams)], size if len(frames) > 1 else [], 0, endpoint)

    def receive(self, port: int) -> tuple[int, int, int]:
        """Sequence number, acknowledgement and flags of the next TCP segment from the pod to this port."""
        while True:
            packet = self.wire.recv(1 << 16)[8 + 14 :]
            header, protocol = (20, packet[9]) if packet[0] >> 4 == 4 else (40, packet[6])
            segment = packet[header:]
            if protocol == socket.IPPROTO_TCP and segment[2:4] == port.to_bytes(2, "big"):
                numbers = int.from_bytes(segment[4:8], "big"), int.from_bytes(segment[8:12], "big")
                return *numbers, segment[13]

    def refused(self, protocol: str) -> int:
        """How many packets the pod's stack has refused for their checksum."""
        is_ipv6_udp = protocol == "Udp" and ":" in self.address
        with netns.inside(self.pod.namespace):
            if is_ipv6_udp:
                lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
                return int(dict(line.split() for line in lines)["Udp6InCsumErrors"])
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(dict(zip(names, values, strict=True))["InCsumErrors"])


@pytest.fixture(scope="module")
def joined(tun: None) -> Iterator[tuple[Host, socket.socket, Pod]]:
    """A host in the place of a node, its Geneve socket, and a pod on the node that is one."""
    with new_lab() as lab, ExitStack() as stack:
        node, host = lab.add_node(), lab.add_host("peer")
        lab.add_foreign_peer(
            PeerRecord(
                id="peer",
                endpoints=(host.underlay["ipv4"],),
                encapsulation="geneve",
                router_mac=host.router_mac,
                prefixes=tuple(str(prefix) for prefix in host.prefixes),
            )
        )
        lab.start()
        offloads = ask(node.control_socket, "status")["offloads"]
        assert all(offloads[name]["on"] for name in ("udp_gro", "merge_tcp", "merge_udp")), offloads
        pod = lab.add_pod(node, "p1")
        wire = stack.enter_context(netns.open_socket(host.namespace, socket.AF_INET, socket.SOCK_DGRAM))
        wire.settimeout(SECONDS)
        wire.bind((host.underlay["ipv4"], PORT))
        yield host, wire, pod


@pytest.fixture(params=[4, 6], ids=["IPv4 inside", "IPv6 inside"])
def peer(joined: tuple[Host, socket.socket, Pod], request: pytest.FixtureRequest) -> Peer:
    host, wire, pod = joined
    (address,) = (ip for ip in pod.ips if (":" in ip) == (request.param == 6))
    return Peer(host, wire, pod, address)


def flipped(frame: bytes) -> bytes:
    """One bit of the payload, the checksum left as it was."""
    return frame[:-500] + bytes([frame[-500] ^ 1]) + frame[-499:]


@pytest.mark.parametrize("gro", [False, True], ids=["singly", "in trains"])
@pytest.mark.parametrize("wrong", [0, 4, COUNT - 1], ids=["the first", "one in the middle", "the last"])
def test_udp(peer: Peer, wrong: int, gro: bool) -> None:
    family = socket.AF_INET6 if ":" in peer.address else socket.AF_INET
    with netns.open_socket(peer.pod.namespace, family, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(SECONDS)
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, int(gro))
        receiver.bind((peer.address, 0))
        packet = peer.packet.but(protocol=UDP, destination_port=receiver.getsockname()[1])
        frames = [packet.but(payload=piece).frame() for piece in PIECES]
        frames[wrong] = flipped(frames[wrong])
        before = peer.refused("Udp")
        peer.send(frames)
        expected = PIECES[:wrong] + PIECES[wrong + 1 :]
        received = b""
        while len(received) < len(expected) * SIZE:
            received += receiver.recv(1 << 16)
        assert received == b"".join(expected)
        receiver.setblocking(False)
        deadline = time.monotonic() + SECONDS
        while peer.refused("Udp") != before + 1:
            assert time.monotonic() < deadline
            with pytest.raises(BlockingIOError):  # the stack sums a datagram when it is asked for it
                receiver.recv(1 << 16)


def test_tcp(peer: Peer) -> None:
    """The corrupt segment is a gap: what is before it is acknowledged, and once it came again, all is."""
    family = socket.AF_INET6 if ":" in peer.address else socket.AF_INET
    with netns.open_socket(peer.pod.namespace, family, socket.SOCK_STREAM) as listener:
        listener.settimeout(SECONDS)
        listener.bind((peer.address, 0))
        listener.listen(1)
        syn = peer.packet.but(
            destination_port=listener.getsockname()[1], sequence=999, flags=SYN, window=65_535
        )
        peer.send([syn.frame()])
        sequence, acknowledged, flags = peer.receive(syn.source_port)
        assert (acknowledged, flags) == (1_000, SYN | ACK)
        ack = syn.but(sequence=1_000, acknowledgement=sequence + 1, flags=ACK)
        peer.send([ack.frame()])
        connection, _ = listener.accept()
        with closing(connection):
            connection.settimeout(SECONDS)
            segments = [ack.but(payload=piece, sequence=1_000 + at * SIZE) for at, piece in enumerate(PIECES)]
            frames = [segment.frame() for segment in segments]
            before, wrong = peer.refused("Tcp"), 4
            peer.send([*frames[:wrong], flipped(frames[wrong]), *frames[wrong + 1 :]])
            assert read(connection, wrong * SIZE) == b"".join(PIECES[:wrong])
            wait_for_acknowledgement(peer, syn.source_port, 1_000 + wrong * SIZE)
            assert peer.refused("Tcp") == before + 1
            assert not select.select([connection], [], [], 0)[0], "nothing of what is behind the gap"
            peer.send([frames[wrong]])
            assert read(connection, (COUNT - wrong) * SIZE) == b"".join(PIECES[wrong:])
            wait_for_acknowledgement(peer, syn.source_port, 1_000 + COUNT * SIZE)


def read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = connection.recv(size - len(received))
        assert piece, "the pod's stack gave up"
        received += piece
    return received


def wait_for_acknowledgement(peer: Peer, port: int, number: int) -> None:
    deadline = time.monotonic() + SECONDS
    acknowledged = 0
    while acknowledged != number:
        assert time.monotonic() < deadline, f"{acknowledged} is acknowledged, not {number}"
        _, acknowledged, _ = peer.receive(port)
        assert acknowledged <= number
