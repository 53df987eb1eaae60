"""Whole journeys over a socketpair and loopback: a batch through encap, and through decap.

Loopback is a kernel too: its share is in each figure, the same for every shape of as many datagrams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from bench import stage, traffic
from bench.conftest import PerPacket
from bench.stage import NO_OFFLOAD, Node
from bench.traffic import JUMBO_MTU, POD_MTU, SHAPES, SUPERFRAME_SEGMENTS, TCP, UDP

ROUNDS = 300
SUPERFRAMES = 4  # 176 segments


@dataclass
class Pair:
    near: Node
    far: Node


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:

        def make(
            encapsulation: str = "geneve",
            mtu: int = POD_MTU,
            gro: bool = True,
            partial_checksums: bool = False,
        ) -> Pair:
            near, far = (
                stack.enter_context(closing(Node(number, encapsulation, mtu, gro))) for number in (1, 2)
            )
            near.join(far, partial_checksums)
            far.join(near, partial_checksums)
            return Pair(near, far)

        yield make


def messages(near: Node, shape: str) -> list[bytes]:
    """What the near node's pods send: a batch of a shape, or superframes."""
    if shape.startswith("superframes"):
        protocol = UDP if "UDP" in shape else TCP
        header, frame = traffic.superframe(protocol, 4, near.router_mac, near.gateway_mac)
        return [header.ljust(len(NO_OFFLOAD), b"\0") + frame] * SUPERFRAMES
    return [
        NO_OFFLOAD + traffic.frame(packet, near.router_mac, near.gateway_mac) for packet in SHAPES[shape]()
    ]


def packets_of(batch: list[bytes], shape: str) -> int:
    return len(batch) * (SUPERFRAME_SEGMENTS if shape.startswith("superframes") else 1)


def measure_encap(per_packet: PerPacket, pair: Pair, shape: str) -> None:
    near, far = pair.near, pair.far
    batch = messages(near, shape)
    packets = packets_of(batch, shape)
    seen = {"near": 0}

    def prepare() -> None:
        near.pods_send(batch)

    def check() -> None:
        seen["near"] += packets
        assert near.forwarded("encap") == seen["near"]
        assert stage.drain(far.receiver) > 0

    per_packet.each_round(
        prepare,
        lambda: near.pump.encap(len(batch)),
        check,
        packets=packets,
        rounds=ROUNDS,
        packet_bytes=sum(map(len, batch)) // packets,
    )


def measure_decap(per_packet: PerPacket, pair: Pair, shape: str) -> None:
    near, far = pair.near, pair.far
    batch = messages(near, shape)
    packets = packets_of(batch, shape)
    seen = {"far": 0}

    def prepare() -> None:
        near.pods_send(batch)
        assert near.pump.encap(len(batch)) == len(batch)
        stage.wait_readable(far.receiver)

    def check() -> None:
        seen["far"] += packets
        assert far.forwarded("decap") == seen["far"]
        assert far.pods_get() > 0

    per_packet.each_round(
        prepare,
        far.decap_waiting,
        check,
        packets=packets,
        rounds=ROUNDS,
        packet_bytes=sum(map(len, batch)) // packets,
    )


EVERY_SHAPE = (*SHAPES, "superframes of TCP", "superframes of UDP")


@pytest.mark.benchmark(group="encap")
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_encap(per_packet: PerPacket, make_pair: Callable[..., Pair], shape: str) -> None:
    measure_encap(per_packet, make_pair(mtu=JUMBO_MTU if shape == "jumbo" else POD_MTU), shape)


@pytest.mark.benchmark(group="decap")
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_decap(per_packet: PerPacket, make_pair: Callable[..., Pair], shape: str) -> None:
    measure_decap(per_packet, make_pair(mtu=JUMBO_MTU if shape == "jumbo" else POD_MTU), shape)


@pytest.mark.benchmark(group="encap")
def test_encap_vxlan(per_packet: PerPacket, make_pair: Callable[..., Pair]) -> None:
    measure_encap(per_packet, make_pair("vxlan"), "one flow")


@pytest.mark.benchmark(group="decap")
def test_decap_vxlan(per_packet: PerPacket, make_pair: Callable[..., Pair]) -> None:
    measure_decap(per_packet, make_pair("vxlan"), "one flow")


@pytest.mark.benchmark(group="encap")
@pytest.mark.parametrize("shape", ["superframes of TCP", "superframes of UDP"])
def test_encap_with_partial_checksums(
    per_packet: PerPacket, make_pair: Callable[..., Pair], shape: str
) -> None:
    measure_encap(per_packet, make_pair(partial_checksums=True), shape)


@pytest.mark.benchmark(group="decap")
@pytest.mark.parametrize("shape", ["superframes of TCP", "superframes of UDP"])
def test_decap_with_partial_checksums(
    per_packet: PerPacket, make_pair: Callable[..., Pair], shape: str
) -> None:
    measure_decap(per_packet, make_pair(partial_checksums=True), shape)


@pytest.mark.benchmark(group="encap")
@pytest.mark.parametrize("shape", ["one flow", "superframes of TCP"])
def test_encap_without_udp_segment(per_packet: PerPacket, make_pair: Callable[..., Pair], shape: str) -> None:
    pair = make_pair()
    pair.near.pump.set_offload("udp_segment", False)
    measure_encap(per_packet, pair, shape)


@pytest.mark.benchmark(group="decap")
@pytest.mark.parametrize("merge", [True, False], ids=["merging", "not merging"])
@pytest.mark.parametrize("gro", [True, False], ids=["GRO", "no GRO"])
def test_decap_by_offload(
    per_packet: PerPacket, make_pair: Callable[..., Pair], gro: bool, merge: bool
) -> None:
    """One flow, by what saves work on the way in."""
    pair = make_pair(gro=gro)
    pair.far.pump.set_offload("merge_tcp", merge)
    measure_decap(per_packet, pair, "one flow")
