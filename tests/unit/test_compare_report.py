"""The comparison's arithmetic, tables and arguments; nothing is measured here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chart import short
from bench.compare import options
from bench.compare.report import (
    METRICS,
    TABLES,
    YARDSTICK,
    Comparison,
    Row,
    Sample,
    Trouble,
    as_json,
    legend,
    make_grids,
    make_rows,
    markdown,
    plot,
)

HOST = {"cpu": "a CPU", "cpus": 2, "kernel": "6.18", "commit": "abc", "rounds": 3, "seconds": 1}
SYSTEMS = (YARDSTICK, "podloom-gso-geneve", "podloom-gso-vxlan", "wireguard-go")


def samples(system: str, metric: str, *values: float, wire: str = "veth") -> list[Sample]:
    return [Sample(wire, system, metric, number, value) for number, value in enumerate(values)]


def one_row(given: list[Sample], system: str) -> Row:
    (row,) = [row for row in make_rows(given) if row.system == system]
    return row


class TestRows:
    def test_median_and_spread(self) -> None:
        row = one_row(samples("veth", "tcp1", 9, 1, 5), "veth")
        assert (row.median, row.min, row.max, row.rounds, row.unit) == (5, 1, 9, 3, "Gb/s")

    def test_an_even_number_of_rounds(self) -> None:
        assert one_row(samples("veth", "tcp1", 4, 6), "veth").median == 5

    def test_the_ratio_is_of_the_medians_and_its_ends_of_the_rounds(self) -> None:
        """A slow round slows both, so each round is its own comparison."""
        given = samples(YARDSTICK, "tcp1", 10, 5, 10) + samples("ours", "tcp1", 8, 4.5, 7)
        row = one_row(given, "ours")
        assert row.ratio_to_kernel_vxlan == pytest.approx(0.7)
        assert row.ratio_min == pytest.approx(0.7)
        assert row.ratio_max == pytest.approx(0.9)

    def test_the_yardstick_is_once_itself(self) -> None:
        assert one_row(samples(YARDSTICK, "tcp1", 3, 4), YARDSTICK).ratio_to_kernel_vxlan == 1

    def test_a_round_that_failed_on_one_side_is_not_paired(self) -> None:
        given = [*samples(YARDSTICK, "tcp1", 10, 20), Sample("veth", "ours", "tcp1", 1, 10)]
        row = one_row(given, "ours")
        assert (row.rounds, row.ratio_min, row.ratio_max) == (1, 0.5, 0.5)

    @pytest.mark.parametrize(
        "yardstick",
        [
            pytest.param([], id="not measured"),
            pytest.param(samples(YARDSTICK, "tcp1", 0, 0), id="zero"),
            pytest.param(samples(YARDSTICK, "tcp1", 4, wire="nic"), id="on another wire"),
            pytest.param(samples(YARDSTICK, "tcp4", 4), id="another metric"),
        ],
    )
    def test_no_ratio_without_a_yardstick(self, yardstick: list[Sample]) -> None:
        row = one_row([*yardstick, *samples("ours", "tcp1", 4)], "ours")
        assert (row.ratio_to_kernel_vxlan, row.ratio_min, row.ratio_max) == (None, None, None)

    def test_wires_are_kept_apart(self) -> None:
        rows = make_rows(samples("veth", "tcp1", 1) + samples("veth", "tcp1", 3, wire="nic"))
        assert [(row.wire, row.median) for row in rows] == [("veth", 1), ("nic", 3)]


def comparison(given: list[Sample], *troubles: Trouble) -> Comparison:
    return Comparison(HOST, make_rows(given), list(troubles))


class TestTables:
    def test_a_cell_tells_median_ratio_spread_and_retransmits(self) -> None:
        given = samples(YARDSTICK, "tcp1", 10, 10, 10) + samples("ours", "tcp1", 7, 8, 9)
        given += samples("ours", "tcp1_retransmits", 3, 3, 4)
        (grid,) = make_grids(comparison(given))
        assert grid.headings == ["TCP 1 Gb/s"]
        assert dict(grid.lines)["ours"] == [("8.00", "0.80x", "7.00-9.00", "3 retr.")]

    def test_what_was_not_measured_is_a_dash(self) -> None:
        (grid,) = make_grids(comparison(samples("a", "tcp1", 1) + samples("b", "tcp8", 1)))
        assert dict(grid.lines) == {"a": [("1.00",), ("-",)], "b": [("-",), ("1.00",)]}

    @pytest.mark.parametrize(("offered", "shown"), [(100, "≥ 100"), (150, "100")])
    def test_a_rate_that_nothing_was_lost_at_is_a_floor(self, offered: float, shown: str) -> None:
        given = samples("ours", "udp64", 100) + samples("ours", "udp64_offered", offered)
        (grid,) = make_grids(comparison(given))
        assert grid.lines == [("ours", [(shown,)])]

    def test_every_metric_of_a_table_has_a_place_in_its_order(self) -> None:
        given = [Sample("veth", "ours", metric, 0, 1) for metric in reversed(METRICS)]
        grids = make_grids(comparison(given))
        assert tuple(grid.title for grid in grids) == TABLES
        titles = [f"{metric.title} {metric.unit}" for metric in METRICS.values() if metric.table]
        assert sorted(heading for grid in grids for heading in grid.headings) == sorted(titles)
        assert grids[0].headings == [title for title in titles if title in grids[0].headings]

    def test_markdown(self) -> None:
        given = samples(YARDSTICK, "tcp1", 10, 10) + samples("ours", "tcp1", 8, 9)
        absent = Trouble("veth", "theirs", None, "it is not installed")
        text = markdown(comparison(given, absent), {"veth": "as it comes"}, {YARDSTICK: "K", "ours": "O"})
        lines = text.splitlines()
        assert "| ours | 8.50<br>0.85x<br>8.00-9.00 |" in lines
        assert "## Wire `veth`: as it comes" in lines
        assert "- theirs on veth, everything: it is not installed" in lines
        assert "flatters everybody" in text
        widths = {line.count("|") for line in lines if line.startswith("|")}
        assert widths == {3}

    def test_the_plot_is_svg_with_a_bar_for_each_system(self) -> None:
        given = samples(YARDSTICK, "tcp1", 10, 12) + samples("a<b", "tcp1", 0, 9)
        root = ElementTree.fromstring(plot(comparison(given)))  # noqa: S314 (our own text)
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {YARDSTICK, "a<b", "TCP 1, Gb/s, wire veth"} <= set(texts)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2  # the ground, and the bars

    def test_a_plot_of_nothing_but_zeroes(self) -> None:
        ElementTree.fromstring(plot(comparison(samples("a", "tcp1", 0))))  # noqa: S314 (our own text)

    @pytest.mark.parametrize(
        ("value", "text"), [(0, "0.00"), (9.876, "9.88"), (45.67, "45.7"), (102398.4, "102398")]
    )
    def test_short(self, value: float, text: str) -> None:
        assert short(value) == text


def test_the_legend_tells_the_generators_limit_if_there_was_one() -> None:
    assert "thread" not in legend(HOST)
    alone = {"udp64": 612_345, "udp1400": 500_000}
    assert "612k (UDP 64 B) and 500k (UDP 1400 B)" in legend(HOST | {"generator_packets_per_second": alone})


def test_json_has_what_is_promised() -> None:
    given = samples(YARDSTICK, "tcp1", 10) + samples("ours", "tcp1", 8)
    told = json.loads(json.dumps(as_json(comparison(given, Trouble("veth", "theirs", "rr", "silence")))))
    assert told["host"] == HOST
    row = next(row for row in told["rows"] if row["system"] == "ours")
    promised = {"system", "metric", "wire", "median", "min", "max", "rounds", "ratio_to_kernel_vxlan"}
    assert promised <= set(row)
    assert row["ratio_to_kernel_vxlan"] == 0.8
    assert told["troubles"] == [{"wire": "veth", "system": "theirs", "metric": "rr", "reason": "silence"}]


DEFAULTS = options.Options(
    wires=options.WIRES,
    systems=SYSTEMS,
    measurements=options.MEASUREMENTS,
    rounds=5,
    seconds=1,
    output=Path("bench-results"),
    json=Path("bench-results/compare.json"),
)


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            ("", DEFAULTS),
            ("--wire nic", replace(DEFAULTS, wires=("nic",))),
            ("--wire bare,veth", replace(DEFAULTS, wires=("veth", "bare"))),
            ("--only tcp8,tcp1", replace(DEFAULTS, measurements=("tcp1", "tcp8"))),
            ("--systems wireguard-go", replace(DEFAULTS, systems=("wireguard-go",))),
            ("--systems podloom-gso", replace(DEFAULTS, systems=SYSTEMS[1:3])),
            ("--systems pod,kernel", replace(DEFAULTS, systems=SYSTEMS[:3])),
            ("--rounds 3 --seconds 2", replace(DEFAULTS, rounds=3, seconds=2)),
            ("--output d", replace(DEFAULTS, output=Path("d"), json=Path("d/compare.json"))),
            ("--output d --json f", replace(DEFAULTS, output=Path("d"), json=Path("f"))),
        ],
    )
    def test_accepted(self, words: str, wanted: options.Options) -> None:
        assert options.parse(words.split(), SYSTEMS) == wanted

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--rounds 0", "'0' is not a whole number in 1..1000"),
            ("--rounds 2.5", "'2.5' is not a whole number in 1..1000"),
            ("--rounds ²", "'²' is not a whole number in 1..1000"),
            ("--seconds 61", "'61' is not a whole number in 1..60"),
            ("--wire copper", "'copper' is no wire; there are: veth, nic, bare"),
            ("--only tcp1,cpu", "'cpu' is no measurement; there are: tcp1,"),
            ("--only tcp", "'tcp' is no measurement"),
            ("--only tcp1,", "'' is no measurement"),
            ("--systems flannel", "'flannel' is no system; there are: kernel-vxlan,"),
            ("--systems ,", "'' is no system"),
            ("tcp1", "unrecognized arguments: tcp1"),
        ],
    )
    def test_refused(self, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            options.parse(words.split(), SYSTEMS)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
