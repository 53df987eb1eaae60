"""Samples to rows, tables, a plot and JSON. Pure: nothing here measures or reads a clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.chart import Bar, Panel, short, svg

YARDSTICK = "kernel-vxlan"
CAVEAT = (
    "All nodes are namespaces of one machine and share its CPUs. A veth wire flatters everybody: superframes "
    "cross it whole and nothing is ever checksummed for it. Look at the wires nic and bare as well."
)


TABLES = ("throughput", "round trips and cost")


@dataclass(frozen=True)
class Metric:
    title: str
    unit: str
    table: str | None
    """Which of TABLES it has a column in."""


def _tcp(streams: int) -> dict[str, Metric]:
    name, title = f"tcp{streams}", f"TCP {streams}"
    cost = TABLES[1] if streams == 1 else None
    return {
        name: Metric(title, "Gb/s", TABLES[0]),
        f"{name}_retransmits": Metric(f"{title} retransmits", "segments", None),
        f"{name}_cpu_all": Metric(f"{title} CPU, all", "s/GB", cost),
        f"{name}_cpu_own": Metric(f"{title} CPU, own", "s/GB", cost),
    }


def _udp(size: int) -> dict[str, Metric]:
    name, title = f"udp{size}", f"UDP {size} B"
    return {
        name: Metric(title, "packets/s", TABLES[0]),
        f"{name}_offered": Metric(f"{title} offered", "packets/s", None),
    }


def _round_trip(name: str, title: str) -> dict[str, Metric]:
    return {f"{name}_{p}": Metric(f"{title} {p}", "µs", TABLES[1]) for p in ("p50", "p99")}


METRICS = {
    **_tcp(1),
    **_tcp(4),
    **_tcp(8),
    **_udp(64),
    **_udp(1400),
    **_round_trip("rr", "request"),
    **_round_trip("flood", "flood ping"),
}


@dataclass(frozen=True)
class Sample:
    """One metric of one system, measured once. Rounds count from 0."""

    wire: str
    system: str
    metric: str
    round: int
    value: float


@dataclass(frozen=True)
class Row:
    """Over all rounds. A ratio is of the medians; its ends are those of the rounds, each of which compares
    what was measured within seconds of each other. None where there is nothing to compare with."""

    system: str
    metric: str
    wire: str
    unit: str
    median: float
    min: float
    max: float
    rounds: int
    ratio_to_kernel_vxlan: float | None
    ratio_min: float | None
    ratio_max: float | None


@dataclass(frozen=True)
class Trouble:
    """What could not be measured. `metric` is None if the system could not be set up at all."""

    wire: str
    system: str
    metric: str | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    host: dict[str, Any]
    rows: list[Row]
    troubles: list[Trouble]


def make_rows(samples: Iterable[Sample]) -> list[Row]:
    """In the order in which each (wire, system, metric) was first measured."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for sample in samples:
        values.setdefault((sample.wire, sample.system, sample.metric), {})[sample.round] = sample.value
    return [
        _make_row(*key, of_round, values.get((key[0], YARDSTICK, key[2]), {}))
        for key, of_round in values.items()
    ]


def _make_row(
    wire: str, system: str, metric: str, values: dict[int, float], yardstick: dict[int, float]
) -> Row:
    median = statistics.median(values.values())
    unit = METRICS[metric].unit
    against = statistics.median(yardstick.values()) if yardstick else 0
    paired = [value / yardstick[n] for n, value in values.items() if yardstick.get(n)]
    return Row(
        system=system,
        metric=metric,
        wire=wire,
        unit=unit,
        median=median,
        min=min(values.values()),
        max=max(values.values()),
        rounds=len(values),
        ratio_to_kernel_vxlan=median / against if against else None,
        ratio_min=min(paired) if paired else None,
        ratio_max=max(paired) if paired else None,
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "host": comparison.host,
        "caveat": CAVEAT,
        "rows": [asdict(row) for row in comparison.rows],
        "troubles": [asdict(trouble) for trouble in comparison.troubles],
    }


@dataclass(frozen=True)
class Grid:
    """A line for each system, a column for each metric; a cell has lines of its own."""

    wire: str
    title: str
    headings: list[str]
    lines: list[tuple[str, list[tuple[str, ...]]]]


def make_grids(comparison: Comparison) -> list[Grid]:
    grids = []
    for wire in dict.fromkeys(row.wire for row in comparison.rows):
        rows = {(row.system, row.metric): row for row in comparison.rows if row.wire == wire}
        measured = {metric for _, metric in rows}
        for title in TABLES:
            metrics = [name for name in METRICS if name in measured and METRICS[name].table == title]
            if not metrics:
                continue
            headings = [f"{METRICS[name].title} {METRICS[name].unit}" for name in metrics]
            lines = [
                (system, [_cell(rows, system, metric) for metric in metrics])
                for system in dict.fromkeys(system for system, _ in rows)
            ]
            grids.append(Grid(wire, title, headings, lines))
    return grids


def _cell(rows: dict[tuple[str, str], Row], system: str, metric: str) -> tuple[str, ...]:
    """The median, its ratio to the yardstick's, its spread, and for TCP the retransmits."""
    row = rows.get((system, metric))
    if row is None:
        return ("-",)
    # If nothing is lost at the most that one sender can offer there, more senders might get more.
    offered = rows.get((system, f"{metric}_offered"))
    floor = "≥ " if offered is not None and row.median > offered.median * 0.98 else ""
    lines = [f"{floor}{short(row.median)}"]
    if row.ratio_to_kernel_vxlan is not None:
        lines.append(f"{row.ratio_to_kernel_vxlan:.2f}x")
    if row.rounds > 1:
        lines.append(f"{short(row.min)}-{short(row.max)}")
    if (retransmits := rows.get((system, f"{metric}_retransmits"))) is not None:
        lines.append(f"{retransmits.median:.0f} retr.")
    return tuple(lines)


def legend(host: dict[str, Any]) -> str:
    said = (
        f"Medians of {host['rounds']} rounds of {host['seconds']} s each; x: times {YARDSTICK}'s; a-b: the "
        "lowest and the highest round. CPU seconds are for each GB of TCP payload: of the whole machine, and "
        "of the processes that forward. TCP is cubic."
    )
    if alone := host.get("generator_packets_per_second"):
        most = " and ".join(f"{rate / 1e3:.0f}k ({METRICS[name].title})" for name, rate in alone.items())
        said += (
            " UDP is what arrives at less than 1% loss, each datagram sent by one thread as a packet of its "
            f"own; alone that thread sends {most} a second. ≥: nothing was lost however fast it sent."
        )
    return said


def markdown(comparison: Comparison, wires: dict[str, str], systems: dict[str, str]) -> str:
    """`wires` and `systems` say what each name stands for."""
    host = comparison.host
    parts = [
        "# podloom compared",
        f"{host['cpu']}, {host['cpus']} CPUs; Linux {host['kernel']}; commit {host['commit']}.",
        legend(host),
        CAVEAT,
    ]
    wire = None
    for grid in make_grids(comparison):
        if grid.wire != wire:
            wire = grid.wire
            parts.append(f"## Wire `{wire}`: {wires[wire]}")
        table = [["", *grid.headings], ["---", *["--:"] * len(grid.headings)]]
        table += [[system, *("<br>".join(cell) for cell in cells)] for system, cells in grid.lines]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
    measured = dict.fromkeys(row.system for row in comparison.rows)
    parts.append("\n".join(f"- `{system}`: {systems[system]}" for system in measured))
    if comparison.troubles:
        parts.append("## Not measured")
        parts.append("\n".join(f"- {sentence(trouble)}" for trouble in comparison.troubles))
    return "\n\n".join(parts) + "\n"


def sentence(trouble: Trouble) -> str:
    what = trouble.metric or "everything"
    return f"{trouble.system} on {trouble.wire}, {what}: {trouble.reason}"


def plot(comparison: Comparison) -> str:
    """A panel for each wire and metric of the table, in SVG."""
    panels = []
    for wire in dict.fromkeys(row.wire for row in comparison.rows):
        for name, metric in METRICS.items():
            rows = [row for row in comparison.rows if (row.wire, row.metric) == (wire, name)]
            if rows and metric.table:
                bars = (
                    Bar(row.system, row.median, row.min, row.max, row.system.startswith("podloom"))
                    for row in rows
                )
                panels.append(Panel(f"{metric.title}, {metric.unit}, wire {wire}", tuple(bars)))
    return svg(
        f"podloom compared, commit {comparison.host['commit']}",
        panels,
        "Medians; whiskers from the lowest to the highest round. One machine, all nodes share its CPUs.",
    )
