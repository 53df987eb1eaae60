"""Cutting superframes, merging segments, planning runs."""

from __future__ import annotations

from array import array

import pytest

from bench import loops, traffic
from bench.conftest import PerPacket
from bench.traffic import BATCH, SHAPES, SUPERFRAME_SEGMENTS, TCP, UDP

PASSES = 16
MAC = bytes(6)


@pytest.mark.benchmark(group="segment")
@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["TCP", "UDP"])
@pytest.mark.parametrize("partial", [False, True], ids=["whole checksums", "partial checksums"])
def test_segment(per_packet: PerPacket, protocol: int, family: int, partial: bool) -> None:
    """A superframe of 44 segments: headers, payload, checksums."""
    header, frame = traffic.superframe(protocol, family, MAC, MAC)
    packets = SUPERFRAME_SEGMENTS * PASSES
    count = per_packet(
        loops.segment,
        loops.Packets([frame]),
        header,
        partial,
        PASSES,
        packets=packets,
        packet_bytes=len(frame) // SUPERFRAME_SEGMENTS,
    )
    assert count == packets


# What a batch becomes: superframes and packets that go alone.
MERGED = {"one flow": 2, "four interleaved": 4, "tiny": 16, "mixed": 41, "jumbo": 3}


@pytest.mark.benchmark(group="coalesce")
@pytest.mark.parametrize("shape", SHAPES)
def test_coalesce(per_packet: PerPacket, shape: str) -> None:
    """A batch merged: headers compared, checksums verified, superframes' headers made."""
    packets = SHAPES[shape]()
    frames = loops.Packets([traffic.frame(packet, MAC, MAC) for packet in packets])
    count = per_packet(
        loops.Merger().merge,
        frames,
        PASSES,
        packets=len(packets) * PASSES,
        packet_bytes=sum(map(len, packets)) // len(packets),
    )
    assert count == MERGED[shape] * PASSES


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize(
    ("keys", "runs"),
    [([7] * BATCH, 2), ([i % 4 for i in range(BATCH)], BATCH)],
    ids=["one peer", "four peers"],
)
def test_plan(per_packet: PerPacket, keys: list[int], runs: int) -> None:
    """Runs of 1,458-byte datagrams: 44 to one send, and none where peers take turns."""
    lengths = array("I", [1458] * BATCH)
    count = per_packet(loops.plan, array("I", keys), lengths, PASSES, packets=BATCH * PASSES)
    assert count == runs * PASSES
