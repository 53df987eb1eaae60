"""Codecs, classification and checksums. A call handles PASSES batches, so that nanoseconds can be told."""

from __future__ import annotations

import pytest

from bench import loops, traffic
from bench.conftest import PerPacket
from bench.traffic import BATCH, SHAPES
from fastpath.wire import geneve, vxlan
from fastpath.wire.checksum import checksum
from fastpath.wire.classify import FrameInfo, classify

PASSES = 16
VNI = 0xABCDEF
MAC = bytes(6)
CODECS = {"geneve": geneve, "vxlan": vxlan}
# Two options that an endpoint may skip: 4 and 12 bytes with their headers (RFC 8926 section 3.5).
OPTIONS = bytes.fromhex("01020100") + bytes.fromhex("010301020000000000000000")
WITH_OPTIONS = bytes([len(OPTIONS) // 4]) + geneve.encode(VNI)[1:] + OPTIONS


@pytest.mark.benchmark(group="tunnel headers")
class TestTunnelHeader:
    @pytest.mark.parametrize("encapsulation", CODECS)
    def test_encode(self, per_packet: PerPacket, encapsulation: str) -> None:
        count = BATCH * PASSES
        last = per_packet(loops.encode, encapsulation, count, packets=count)
        assert last == CODECS[encapsulation].encode(count - 1)

    @pytest.mark.parametrize(
        ("encapsulation", "header"),
        [
            pytest.param("geneve", geneve.encode(VNI), id="geneve"),
            pytest.param("geneve", WITH_OPTIONS, id="geneve with two options"),
            pytest.param("vxlan", vxlan.encode(VNI), id="vxlan"),
        ],
    )
    def test_decode(self, per_packet: PerPacket, encapsulation: str, header: bytes) -> None:
        datagrams = loops.Packets([header + bytes(60)] * BATCH)
        total = per_packet(loops.decode, datagrams, encapsulation, PASSES, packets=BATCH * PASSES)
        assert total == (len(header) + VNI) * BATCH * PASSES


@pytest.mark.benchmark(group="classify")
@pytest.mark.parametrize("shape", SHAPES)
def test_classify(per_packet: PerPacket, shape: str) -> None:
    """Headers read, and the flow hashed."""
    frames = [traffic.frame(packet, MAC, MAC) for packet in SHAPES[shape]()]
    total = per_packet(loops.classify, loops.Packets(frames), PASSES, packets=len(frames) * PASSES)
    answers = [classify(frame) for frame in frames]
    assert total == PASSES * sum(answer.flow_hash for answer in answers if isinstance(answer, FrameInfo))


@pytest.mark.benchmark(group="checksum")
@pytest.mark.parametrize("length", [20, 64, 256, 1448, 8948, 65483], ids=lambda length: f"{length} bytes")
@pytest.mark.parametrize("offset", [0, 2], ids=["aligned", "two bytes off"])
def test_checksum(per_packet: PerPacket, length: int, offset: int) -> None:
    """Payload in a frame begins behind headers of any length: aligned is the exception."""
    memory = memoryview(bytes(i * 31 & 0xFF for i in range(length + offset)))
    passes = BATCH * PASSES
    total = per_packet(loops.checksum, memory[offset:], passes, packets=passes, packet_bytes=length)
    words = sum(int.from_bytes(memory[i : i + 2], "little") for i in range(offset, length + offset, 2))
    folded = [(words + k - 1) % 0xFFFF + 1 for k in range(passes)]  # one's complement: no zero
    assert total == sum(folded)


@pytest.mark.benchmark(group="complete a partial checksum")
@pytest.mark.parametrize("payload", [22, 1398])
def test_complete_checksum(per_packet: PerPacket, payload: int) -> None:
    """What a small frame from a pod costs: its checksum is not finished yet."""
    packet = traffic.tcp(0, 0, payload)
    pseudo = b"".join(traffic.ends(0, 4)) + (len(packet) - 20).to_bytes(4) + (6).to_bytes(4)
    partial = packet[:36] + (~checksum(pseudo) & 0xFFFF).to_bytes(2) + packet[38:]
    header = bytes((traffic.NEEDS_CHECKSUM, 0, 0, 0, 0, 0, 34, 0, 16, 0))
    frames = loops.Packets([traffic.frame(partial, MAC, MAC)] * BATCH)
    field = per_packet(loops.complete_checksums, frames, header, PASSES, packets=BATCH * PASSES)
    assert field.to_bytes(2, "little") == packet[36:38]
