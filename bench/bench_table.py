"""Whose is this inner address? Tables of 10, 1,000 and 100,000 prefixes, as of so many nodes."""

from __future__ import annotations

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import loops
from bench.conftest import PerPacket, one_cpu
from fastpath.table import PrefixTable

SIZES = (10, 1_000, 100_000)
LOOKUPS = 4096
PASSES = 4
SLOTS = 1_000


def prefix(node: int, family: int) -> tuple[bytes, int]:
    """A pod prefix of its own for each node: /24 and /64."""
    if family == 4:
        return bytes((10 + (node >> 16), node >> 8 & 0xFF, node & 0xFF, 0)), 24
    return bytes.fromhex("fd42") + bytes(2) + node.to_bytes(4) + bytes(8), 64


def table(size: int, family: int) -> PrefixTable:
    made = PrefixTable()
    for node in range(size):
        made.insert(*prefix(node, family), node % SLOTS)
    return made


def addresses(size: int, family: int) -> tuple[memoryview, int]:
    """LOOKUPS pods spread over the nodes, and the sum of the slots they lead to."""
    nodes = [i * 40_503 % size for i in range(LOOKUPS)]  # an odd stride: no order the memory could guess
    pods = [prefix(node, family)[0][:-1] + bytes([i & 0xFF]) for i, node in enumerate(nodes)]
    length = len(pods[0])
    return memoryview(b"".join(pods)).cast("B", (LOOKUPS, length)), sum(node % SLOTS for node in nodes)


@pytest.mark.benchmark(group="lookup")
@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size} prefixes")
def test_lookup(per_packet: PerPacket, size: int, family: int) -> None:
    pods, expected = addresses(size, family)
    total = per_packet(loops.lookup, table(size, family), pods, PASSES, packets=LOOKUPS * PASSES)
    assert total == expected * PASSES


@pytest.mark.benchmark(group="lookup")
@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
def test_lookup_is_flat(benchmark: BenchmarkFixture, family: int) -> None:
    """Ten thousand times the prefixes cost cache misses and no more probes."""
    tables = [(table(size, family), addresses(size, family)[0]) for size in (SIZES[0], SIZES[-1])]

    def fastest(made: PrefixTable, pods: memoryview) -> float:
        took = []
        for _ in range(20):
            began = time.perf_counter()
            loops.lookup(made, pods, PASSES)
            took.append(time.perf_counter() - began)
        return min(took)

    with one_cpu():
        small, large = benchmark.pedantic(lambda: [fastest(*given) for given in tables])
    benchmark.extra_info["times_the_cost_of_10_prefixes"] = round(large / small, 2)
    assert large / small < 10
