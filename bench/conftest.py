"""What every benchmark needs: a build that figures may come from, and a record of where they came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import chart, compiled, machine

TOLD = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TOLD] = []
    try:
        machine.refuse_unfit_build()
    except machine.UnfitBuildError as error:
        raise pytest.UsageError(str(error)) from error
    if not config.option.collectonly:
        compiled.install("bench.loops")


@contextmanager
def one_cpu() -> Iterator[None]:
    """This process stays on one CPU, the last: the first takes most interrupts."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


class PerPacket:
    """Times something that handles many packets at once; `extra_info` has the figures of one packet."""

    def __init__(self, benchmark: BenchmarkFixture, told: list[str]) -> None:
        """`told` gets a line for the end of the run."""
        self._benchmark = benchmark
        self._told = told

    def __call__(self, function: Callable[..., Any], *args: Any, packets: int, packet_bytes: int = 0) -> Any:
        """What the function returned. It handles `packets` in each call."""
        result = self._benchmark(function, *args)
        self._stamp(packets, packet_bytes)
        return result

    def each_round(
        self,
        prepare: Callable[[], None],
        function: Callable[[], Any],
        check: Callable[[], None],
        *,
        packets: int,
        rounds: int,
        packet_bytes: int = 0,
    ) -> None:
        """`prepare` before and `check` after each timed call, neither of them timed."""
        state = {"to_check": False}

        def setup() -> None:
            if state["to_check"]:
                check()
            prepare()
            state["to_check"] = True

        self._benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=5)
        check()
        self._stamp(packets, packet_bytes)

    def _stamp(self, packets: int, packet_bytes: int) -> None:
        extra = self._benchmark.extra_info
        extra["packets"] = packets
        if self._benchmark.stats is None:
            return  # timing is switched off
        seconds = self._benchmark.stats.stats.median / packets
        extra["ns_per_packet"] = round(seconds * 1e9, 2)
        line = f"{seconds * 1e9:10.1f} ns"
        if packet_bytes:
            extra["gbps"] = round(packet_bytes * 8 / seconds / 1e9, 3)
            line += f" {extra['gbps']:8.1f} Gb/s"
        self._told.append(f"{line:26} {self._benchmark.name}")


@pytest.fixture
def per_packet(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[PerPacket]:
    with one_cpu():
        yield PerPacket(benchmark, request.config.stash[TOLD])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if told := config.stash[TOLD]:
        terminalreporter.section("medians for each packet")
        terminalreporter.write("\n".join(told) + "\n")


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Stamp every benchmark, and draw them beside the JSON file."""
    stamp = machine.describe()
    for entry in output_json["benchmarks"]:
        entry["extra_info"] |= stamp
        entry["stats"].pop("data", None)  # each single timing: a hundred times the rest
    file = config.option.benchmark_json
    if file is not None:
        # pytest-benchmark 4 has opened it, 5 has not.
        path = file if isinstance(file, Path) else Path(file.name)
        title = f"podloom benchmarks, commit {stamp['commit']}"
        drawing = chart.svg(title, _panels(output_json["benchmarks"]), "Medians; whiskers are quartiles.")
        path.with_suffix(".svg").write_text(drawing)
        if panels := _scale_panels(output_json["benchmarks"]):
            title = f"podloom among few nodes and among thousands, commit {stamp['commit']}"
            drawing = chart.svg(title, panels, "A panel has a scale of its own. How: bench/bench_scale.py.")
            path.with_name("scale.svg").write_text(drawing)


def _scale_panels(entries: list[dict[str, Any]]) -> list[chart.Panel]:
    """What benchmarks have put into extra_info["scale"]: {figure: {how many peers: value}}."""
    return [
        chart.Panel(figure, tuple(chart.Bar(label, value, value, value) for label, value in values.items()))
        for entry in entries
        for figure, values in entry["extra_info"].get("scale", {}).items()
    ]


def _panels(entries: list[dict[str, Any]]) -> list[chart.Panel]:
    """Medians, whiskers from the first to the third quartile."""
    groups: dict[str, list[chart.Bar]] = {}
    for entry in entries:
        packets = entry["extra_info"].get("packets")
        unit, scale = ("ns per packet", 1e9 / packets) if packets else ("ms", 1e3)
        stats = entry["stats"]
        bar = chart.Bar(
            entry["name"].removeprefix("test_"), *(stats[key] * scale for key in ("median", "q1", "q3"))
        )
        groups.setdefault(f"{entry['group'] or entry['name'].partition('[')[0]}, {unit}", []).append(bar)
    return [chart.Panel(title, tuple(bars)) for title, bars in groups.items()]
