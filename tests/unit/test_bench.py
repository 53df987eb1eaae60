"""The benchmarks' own Cython fits fastpath's .pxd files, and the shapes are what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import against, compiled, traffic
from fastpath.drops import DropReason
from fastpath.offload.coalesce import merge
from fastpath.offload.segment import cut
from fastpath.wire.classify import FrameInfo, classify

MAC = bytes(6)


@pytest.mark.parametrize("name", ["bench.loops", "bench.compare.load"])
def test_translates(name: str, tmp_path: Path) -> None:
    """As a user of fastpath's .pxd files would: a change of theirs must be made there as well."""
    (extension,) = compiled.translate(name, tmp_path)
    assert Path(extension.sources[0]).stat().st_size > 0


@pytest.mark.parametrize(
    ("compiler", "unoptimised"),
    [
        ("GNU C11 12.2.0 -g -O3 -O3 -std=c11", False),
        ("GNU C11 12.2.0 -g -O3 -O0 -std=c11", True),
        ("GNU C11 12.2.0 -Og -g", True),
        ("clang version 16.0.6", False),
    ],
)
def test_a_debug_build_is_known_by_its_flags(compiler: str, unoptimised: bool) -> None:
    assert compiled.is_unoptimised(compiler) is unoptimised


class TestTraffic:
    @pytest.mark.parametrize(
        ("shape", "flows", "longest"),
        [
            ("one flow", 1, 1450),
            ("four interleaved", 4, 1450),
            ("tiny", 16, 50),
            ("mixed", 8, 1450),
            ("jumbo", 1, 8950),
        ],
    )
    def test_shapes(self, shape: str, flows: int, longest: int) -> None:
        packets = traffic.SHAPES[shape]()
        answers = [classify(traffic.frame(packet, MAC, MAC)) for packet in packets]
        infos = [answer for answer in answers if isinstance(answer, FrameInfo)]
        assert len(infos) == len(packets)
        assert len({info.flow_hash for info in infos}) >= flows
        assert max(info.packet_length for info in infos) <= longest

    @pytest.mark.parametrize("shape", ["one flow", "four interleaved", "tiny", "jumbo"])
    def test_checksums_are_right(self, shape: str) -> None:
        """Or else nothing would merge."""
        packets = traffic.SHAPES[shape]()
        assert len(merge([traffic.frame(packet, MAC, MAC) for packet in packets])) < len(packets) / 2

    @pytest.mark.parametrize("family", [4, 6])
    @pytest.mark.parametrize("protocol", [traffic.TCP, traffic.UDP])
    def test_superframes(self, protocol: int, family: int) -> None:
        header, frame = traffic.superframe(protocol, family, MAC, MAC)
        segments = cut(header, frame)
        assert not isinstance(segments, DropReason)
        assert [len(segment) for segment in segments] == [14 + traffic.POD_MTU] * 44
        assert len(merge(segments)) == 1


class TestChange:
    @pytest.mark.parametrize(
        ("then", "now", "clear"),
        [
            ((10, 11, 12), (13, 14, 15), True),
            ((10, 11, 12), (7, 8, 9), True),
            ((10, 11, 12), (12, 14, 15), False),
            ((10, 11, 20), (13, 14, 15), False),
        ],
    )
    def test_is_clear_if_no_rounds_overlap(
        self, then: tuple[float, ...], now: tuple[float, ...], clear: bool
    ) -> None:
        (change,) = against.compare([{"a": value} for value in then], [{"a": value} for value in now])
        assert change.is_clear is clear

    def test_medians_and_what_both_have(self) -> None:
        then = [{"a": 1.0, "gone": 1.0}, {"a": 3.0, "gone": 1.0}, {"a": 2.0, "gone": 1.0}]
        now = [{"new": 9.0, "a": 4.0}]
        (change,) = against.compare(then, now)
        assert (change.name, change.then, change.now, change.ratio) == ("a", 2.0, 4.0, 2.0)
