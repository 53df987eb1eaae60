"""A real daemon with a thousand peers: how long until it answers, and how much memory it is resident in."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from forwarder.demo.lab import Lab, PeerRecord

PEERS = 1_000
RSS_LIMIT_KIB = 64 << 10


def peer(number: int) -> PeerRecord:
    high, low = divmod(number, 256)
    return PeerRecord(
        id=f"peer-{number}",
        endpoints=(f"198.18.{high}.{low}",),  # RFC 2544: for benchmarks, and never on a wire here
        encapsulation="geneve",
        router_mac=f"02:70:6d:00:{high:02x}:{low:02x}",
        prefixes=(f"10.71.{128 + number // 16}.{number % 16 * 16}/28", f"fd71:0:0:{0x1000 + number:x}::/64"),
    )


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} has no VmRSS")


@pytest.mark.benchmark(group="daemon")
def test_start_with_a_thousand_peers(benchmark: BenchmarkFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: the daemon's start and memory are NOT measured in this run")
    with ExitStack() as stack:
        labs: list[Lab] = []

        def setup() -> None:
            stack.close()
            lab = stack.enter_context(Lab(f"bench-{os.getpid():x}"))
            lab.add_node()
            for number in range(PEERS):
                lab.add_foreign_peer(peer(number))
            labs.append(lab)

        benchmark.pedantic(lambda: labs[-1].start(), setup=setup, rounds=3)
        (node,) = labs[-1].nodes
        assert len(labs[-1].ask(node, "peers")) == PEERS
        resident = resident_kib(labs[-1].daemon(node).pid)
        benchmark.extra_info["resident_kib"] = resident
        assert resident <= RSS_LIMIT_KIB
