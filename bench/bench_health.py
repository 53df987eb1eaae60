"""What probing costs the event loop: one simulated second of a node that has so many peers, all up."""

from __future__ import annotations

import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import one_cpu
from forwarder.health import Health, State
from forwarder.probe import Report, decode, encode_report

TICK_SECONDS = 0.02
SETTLE_SECONDS = 20.0


class Node:
    """A node whose peers each send a report when they hear one, as often as they would by their clocks."""

    def __init__(self, count: int) -> None:
        self.health = Health(1, random.Random(1).random)
        self.sequences: dict[str, int] = {}
        self.padded: dict[str, int] = {}
        self.now = 0.0
        self.sent = 0
        for number in range(count):
            self.health.add(f"n{number}", self.now)
            self.health.limit(f"n{number}", 1500)
        self.run(SETTLE_SECONDS)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += TICK_SECONDS
            for send in self.health.poll(self.now):
                self.sent += 1
                if (answer := self.answer(send.peer_id, send.probe)) is not None:
                    message = decode(answer)
                    assert message is not None
                    self.sent += len(self.health.hear(send.peer_id, message, self.now + 1e-4))

    def answer(self, peer_id: str, probe: bytes) -> bytes | None:
        report = decode(probe)
        if not isinstance(report, Report):
            assert report is not None
            self.padded[peer_id] = report.number
            return None
        sequence = self.sequences[peer_id] = self.sequences.get(peer_id, 0) + 1
        return encode_report(
            Report(
                session=2,
                sequence=sequence,
                interval_ms=report.interval_ms,
                detect_multiplier=3,
                hears=True,
                heard_session=report.session,
                heard_sequence=report.sequence,
                heard_mask=(1 << 64) - 1,
                heard_padded=self.padded.get(peer_id, 0),
            )
        )


@pytest.mark.benchmark(group="health")
@pytest.mark.parametrize("peers", [10, 1_000, 5_000], ids=lambda peers: f"{peers} peers")
def test_a_second(benchmark: BenchmarkFixture, peers: int) -> None:
    """The time is also the share of a CPU, without the system calls; the peers' own work is in it, too."""
    node = Node(peers)
    assert all(node.health.state(f"n{i}", node.now).state == State.UP for i in range(peers))  # type: ignore[union-attr]
    node.sent, began = 0, node.now
    with one_cpu():
        benchmark.pedantic(node.run, args=(1.0,), rounds=5, iterations=1)
    benchmark.extra_info["probes_per_second"] = round(node.sent / (node.now - began))
