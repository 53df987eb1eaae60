"""Random and mutated packets by the hundred thousand: no crash, nothing leaks, the books balance.

Each batch goes through the kernel's UDP sockets and then, packet by packet, through the oracle: what comes
out must be exactly the frames the oracle delivers, in order, and each drop one of the reasons it allows.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest

from tests.packets import build
from tests.pipeline.harness import VNI, Node, Wire, gateway_mac, pod, router_mac, wire_address
from tests.reference import journeys

MakeNode = Callable[..., Node]
MakeWire = Callable[[str], Wire]

BATCH = 64  # small enough that no socket buffer overflows, so nothing is lost in the kernel
# Measured: after the first tenth neither pump nor interpreter grows; this leaves room for one malloc arena.
RSS_GROWTH_BYTES = 2 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def seeds(destination: bytes, source: bytes, near: int, far: int) -> list[bytes]:
    """Good frames from node `far`'s pods to node `near`'s, of every kind that is forwarded."""
    packets = []
    for family in (4, 6):
        ends = pod(far, family), pod(near, family)
        packets += [build.udp(*ends), build.udp(*ends, b"", tos=2), build.udp(*ends, bytes(1_200), tos=1)]
        packets += [build.tcp(*ends, bytes(9), tos=3), build.ping(*ends)]
        packets += build.fragments(*ends, payload_length=2_000)
    frames = [build.frame(packet, destination=destination, source=source) for packet in packets]
    return frames + [frame + b"\xaa" * 7 for frame in frames[:4]]


def mutate(packet: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, near the front most of the time; sometimes cut, lengthened or spliced."""
    mutated = bytearray(packet)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        if mutated:
            at = rng.randrange(min(len(mutated), rng.choice((8, 24, 80, 2_000))))
            mutated[at] = rng.choice((0, 0xFF, mutated[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    kind = rng.randrange(12)
    if kind == 0:
        del mutated[rng.randrange(len(mutated) + 1) :]
    elif kind == 1:
        mutated += rng.randbytes(rng.randrange(64))
    elif kind == 2:
        mutated[rng.randrange(len(mutated) + 1) :] = packet[rng.randrange(len(packet) + 1) :]
    elif kind == 3:
        return rng.randbytes(rng.randrange(rng.choice((4, 16, 64, 1_400))))
    return bytes(mutated)


def tunnel_header(encapsulation: str, rng: random.Random) -> bytes:
    vni = VNI if rng.randrange(20) else rng.randrange(1 << 24)
    if encapsulation == "vxlan":
        return build.vxlan(vni)
    options = b"".join(
        build.geneve_option(bytes(4 * rng.randrange(8)), kind=rng.choice((0x01, 0x01, 0x01, 0x80)))
        for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))
    )
    return build.geneve(vni, options=options, critical=rng.randrange(8) == 0, oam=rng.randrange(16) == 0)


def batched(packets: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while batch := list(islice(packets, size)):
        yield batch


class Books:
    """What the oracle says of every packet so far."""

    def __init__(self) -> None:
        self.forwarded = 0
        self.only: Counter[str] = Counter()
        """Drops that have one reason."""
        self.either: Counter[str] = Counter()
        """Drops that may be counted under any of several, once for each of them."""

    def drop(self, answer: journeys.Dropped) -> None:
        for reason in answer.reasons:
            (self.only if len(answer.reasons) == 1 else self.either)[reason.lower()] += 1

    def assert_agree(self, node: Node, direction: str, sent: int) -> None:
        counted = node.dropped(direction)
        assert node.received(direction) == sent
        assert node.forwarded(direction) == self.forwarded
        assert self.forwarded + sum(counted.values()) == sent
        for reason in counted.keys() | self.only.keys():
            least = self.only[reason]
            assert least <= counted.get(reason, 0) <= least + self.either[reason], reason


def decap_soak(node: Node, peer: Wire, stranger: Wire | None, encapsulation: str, count: int) -> Books:
    rng = random.Random(f"{encapsulation} {count}")
    frames = seeds(router_mac(1), router_mac(2), near=1, far=2)
    peer_address = socket.inet_pton(
        socket.AF_INET6 if node.family == 6 else socket.AF_INET, wire_address(2, node.family)
    )
    endpoint = (node.address, node.port(encapsulation))
    books, sent, resident = Books(), 0, 0

    def datagrams() -> Iterator[bytes]:
        for _ in range(count):
            frame = rng.choice(frames)
            if rng.randrange(2):
                frame = mutate(frame, rng)
            datagram = tunnel_header(encapsulation, rng) + frame
            yield mutate(datagram, rng) if rng.randrange(3) == 0 else datagram

    for batch in batched(datagrams(), BATCH):
        tos = rng.choice((0, 0, 0, 1, 2, 3))
        from_stranger = stranger is not None and rng.randrange(50) == 0
        sender = stranger if stranger is not None and from_stranger else peer
        sender.set_tos(tos)
        for datagram in batch:
            sender.socket.sendto(datagram, endpoint)
        node.decap(encapsulation, len(batch))
        expected = []
        for datagram in batch:
            source = b"\x7f\x00\x47\x63" if from_stranger else peer_address
            answer = journeys.decap(node.oracle, encapsulation, source, tos, datagram)
            if isinstance(answer, journeys.Dropped):
                books.drop(answer)
            else:
                expected.append(answer)
        assert node.pods_get() == expected
        books.forwarded += len(expected)
        sent += len(batch)
        if resident == 0 and sent * 10 >= count:
            resident = resident_bytes()
    books.assert_agree(node, "decap", count)
    node.assert_counters_close()
    assert resident_bytes() - resident < RSS_GROWTH_BYTES
    return books


@pytest.mark.parametrize(
    "count", [50_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_decap(make_node: MakeNode, make_wire: MakeWire, encapsulation: str, count: int) -> None:
    node = make_node(1, 4)
    peer, stranger = make_wire(wire_address(2, 4)), make_wire(wire_address(99, 4))
    node.add_peer(1, 2, peer.port, encapsulation=encapsulation)
    books = decap_soak(node, peer, stranger, encapsulation, count)
    # The mutations reach deep: a good part is forwarded, and every check on the way refuses something.
    assert books.forwarded > count / 5
    refused = {reason for reason, times in (books.only + books.either).items() if times}
    tunnel = (
        {"tunnel_version", "tunnel_oam", "tunnel_options", "tunnel_protocol", "tunnel_critical_option"}
        if encapsulation == "geneve"
        else {"tunnel_flags"}
    )
    assert refused >= tunnel | {
        "unknown_peer",
        "tunnel_short",
        "vni_unknown",
        "frame_short",
        "frame_not_for_router",
        "frame_not_ip",
        "ip_malformed",
        "ip_ttl_expired",
        "inner_source",
        "inner_destination",
        "ecn_ce_not_ect",
    }


def test_decap_over_ipv6(make_node: MakeNode, make_wire: MakeWire, family: int, encapsulation: str) -> None:
    if family == 6:
        node, peer = make_node(1, 6), make_wire(wire_address(2, 6))
        node.add_peer(1, 2, peer.port, encapsulation=encapsulation)
        decap_soak(node, peer, None, encapsulation, 10_000)


def virtio_for(frame: bytes, size: int, rng: random.Random) -> bytes:
    """Mostly a header that asks for nothing, else one that a kernel might write, or garbage."""
    kind = rng.randrange(6)
    if kind > 1:
        return bytes(size)
    if kind == 1:
        return build.virtio(size=size, flags=1, checksum_start=34, checksum_offset=rng.choice((6, 16)))
    garbage = bytearray(rng.randbytes(10).ljust(size, b"\0"))
    garbage[1] = 0  # no superframe: those have tests of their own
    return bytes(garbage)


@pytest.mark.parametrize(
    "count", [30_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_encap(make_node: MakeNode, make_wire: MakeWire, encapsulation: str, count: int) -> None:
    rng = random.Random(f"encap {encapsulation} {count}")
    node = make_node(1, 4, senders=1)  # one socket: what is sent arrives in order
    wire = make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    frames = seeds(router_mac(1), gateway_mac(1), near=2, far=1)
    books, sent, resident = Books(), 0, 0

    def from_pods() -> Iterator[bytes]:
        for _ in range(count):
            frame = rng.choice(frames)
            yield mutate(frame, rng) if rng.randrange(2) else frame

    for batch in batched(from_pods(), BATCH):
        expected = []
        for frame in batch:
            virtio = virtio_for(frame, node.vnet_header_size, rng)
            node.pods_send(frame, virtio)
            answer = journeys.encap(node.oracle, virtio, frame)
            if isinstance(answer, journeys.Dropped):
                books.drop(answer)
            else:
                expected.append((answer.datagram, answer.ecn))
        assert node.pump.encap() == len(batch)
        got = [(datagram.payload, datagram.tos) for datagram in wire.get(len(expected))]
        assert got == expected
        books.forwarded += len(expected)
        sent += len(batch)
        if resident == 0 and sent * 10 >= count:
            resident = resident_bytes()
    books.assert_agree(node, "encap", count)
    node.assert_counters_close()
    assert resident_bytes() - resident < RSS_GROWTH_BYTES
    assert books.forwarded > count / 4


@pytest.mark.parametrize("direction", ["encap", "decap"])
def test_a_packet_costs_no_python_object(
    make_node: MakeNode, make_wire: MakeWire, opened: ExitStack, direction: str
) -> None:
    """A batch of one and a batch of sixty leave, and need, as many interpreter blocks."""
    import sys

    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    frame = node.frame(build.udp(pod(1, 4), pod(2, 4)))
    datagram = build.geneve(VNI) + build.frame(
        build.udp(pod(2, 4), pod(1, 4)), destination=router_mac(1), source=router_mac(2)
    )
    message, endpoint = node.virtio() + frame, (node.address, node.port("geneve"))
    fd = node.receivers["geneve"]

    def blocks_for(count: int) -> int:
        for _ in range(count):
            if direction == "encap":
                node.tap.send(message)
            else:
                wire.socket.sendto(datagram, endpoint)
        before = sys.getallocatedblocks()
        moved = node.pump.encap(100) if direction == "encap" else node.pump.decap(fd, 100)
        after = sys.getallocatedblocks()
        assert moved == count
        return after - before

    blocks_for(60)
    assert blocks_for(60) <= blocks_for(1)
