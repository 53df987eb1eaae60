"""What a run of the comparison is asked for. Pure; a bad argument ends it with what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MEASUREMENTS = ("tcp1", "tcp4", "tcp8", "udp64", "udp1400", "rr", "flood")
WIRES = ("veth", "nic", "bare")
MAX_ROUNDS, MAX_SECONDS = 1000, 60


@dataclass(frozen=True)
class Options:
    wires: tuple[str, ...]
    systems: tuple[str, ...]
    measurements: tuple[str, ...]
    rounds: int
    seconds: int
    output: Path
    json: Path


def parse(arguments: Sequence[str], systems: Iterable[str]) -> Options:
    """SystemExit with the reason, as argparse does it."""
    systems = tuple(systems)
    parser = argparse.ArgumentParser(
        prog="make compare",
        description="Measure podloom beside the kernel's VXLAN and others, in interleaved rounds.",
        epilog=f"Measurements: {', '.join(MEASUREMENTS)}. Systems: {', '.join(systems)}; the beginning of a "
        "name stands for all that begin so.",
    )
    parser.add_argument(
        "--wire",
        metavar="WIRES",
        type=_names("wire", WIRES),
        default=WIRES,
        help="what the underlay can do: veth (as it comes), nic (transmit offloads off, GRO on), bare (GRO "
        "off too); default: all three",
    )
    parser.add_argument(
        "--systems",
        metavar="NAMES",
        type=_names("system", systems, by_beginning=True),
        default=systems,
        help="comma-separated; default: all",
    )
    parser.add_argument(
        "--only",
        metavar="NAMES",
        type=_names("measurement", MEASUREMENTS),
        default=MEASUREMENTS,
        help="comma-separated measurements; default: all",
    )
    parser.add_argument("--rounds", metavar="N", type=_count(MAX_ROUNDS), default=5, help="default: 5")
    parser.add_argument(
        "--seconds", metavar="S", type=_count(MAX_SECONDS), default=1, help="of each measurement; default: 1"
    )
    parser.add_argument(
        "--output",
        metavar="DIRECTORY",
        type=Path,
        default=Path("bench-results"),
        help="where compare.md, compare.svg and compare.json go; default: bench-results",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="default: compare.json in the output directory"
    )
    parsed = parser.parse_args(arguments)
    return Options(
        wires=parsed.wire,
        systems=parsed.systems,
        measurements=parsed.only,
        rounds=parsed.rounds,
        seconds=parsed.seconds,
        output=parsed.output,
        json=parsed.json or parsed.output / "compare.json",
    )


def _names(
    kind: str, known: tuple[str, ...], *, by_beginning: bool = False
) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated list to names that are known, in their own order."""

    def convert(text: str) -> tuple[str, ...]:
        chosen = set[str]()
        for word in text.split(","):
            matching = {
                name for name in known if name == word or (by_beginning and word and name.startswith(word))
            }
            if not matching:
                raise argparse.ArgumentTypeError(f"{word!r} is no {kind}; there are: {', '.join(known)}")
            chosen |= matching
        return tuple(name for name in known if name in chosen)

    return convert


def _count(largest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 1..{largest}")
        return int(text)

    return convert
