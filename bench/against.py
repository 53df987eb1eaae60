"""`make bench-against REV=...`: the benchmarks of another revision and of this checkout, in turns.

Each revision runs its own benchmarks, which fit its own internals; what has the same name is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.chart import short
from bench.compiled import ROOT

PYTEST = ("-m", "pytest", "-q", "-o", "python_files=bench_*.py", "bench", "--benchmark-only")


class AgainstError(Exception):
    """The other revision cannot be measured; the message says why."""


@dataclass(frozen=True)
class Change:
    """Medians of the rounds' medians, in seconds for each call, and their ends."""

    name: str
    then: float
    then_ends: tuple[float, float]
    now: float
    now_ends: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.now / self.then

    @property
    def is_clear(self) -> bool:
        """No round of one side lies among those of the other."""
        return self.now_ends[0] > self.then_ends[1] or self.now_ends[1] < self.then_ends[0]


def compare(then: list[dict[str, float]], now: list[dict[str, float]]) -> list[Change]:
    """Rounds of {benchmark: median} of each side; what both have, in this side's order."""
    shared = [name for name in now[0] if all(name in each for each in (*then, *now))]
    return [Change(name, *_figures(then, name), *_figures(now, name)) for name in shared]


def _figures(rounds: list[dict[str, float]], name: str) -> tuple[float, tuple[float, float]]:
    values = [each[name] for each in rounds]
    return statistics.median(values), (min(values), max(values))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-against", description=__doc__)
    parser.add_argument("revision", help="anything git knows as a commit")
    parser.add_argument("--rounds", type=int, default=3, help="of each side; default: 3")
    parser.add_argument("--only", metavar="EXPRESSION", help="which benchmarks, as pytest's -k")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} is less than 1")
    console = Console(stderr=True, highlight=False)
    then: list[dict[str, float]] = []
    now: list[dict[str, float]] = []
    try:
        commit = _resolve(arguments.revision)
        with console.status(f"building {commit[:12]}") as status, _worktree(commit) as other:
            _build(other)
            for number in range(arguments.rounds):
                for side, checkout, rounds in ((commit[:12], other, then), ("this checkout", ROOT, now)):
                    status.update(f"round {number + 1} of {arguments.rounds}: {side}")
                    rounds.append(_run(checkout, arguments.only))
    except AgainstError as error:
        console.print(f"make bench-against: {error}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the other revision's checkout is removed")
        return 130
    changes = compare(then, now)
    _print(commit, changes)
    file = ROOT / "bench-results" / f"against-{commit[:12]}.json"
    file.parent.mkdir(exist_ok=True)
    told = {"then": commit, "changes": [asdict(change) | {"ratio": change.ratio} for change in changes]}
    file.write_text(json.dumps(told, indent=2) + "\n")
    sys.stdout.write(f"written: {file.relative_to(ROOT)}\n")
    return 0


def _resolve(revision: str) -> str:
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode != 0:
        raise AgainstError(f"{revision!r} is no commit here; try a tag, a branch or HEAD~1")
    commit = done.stdout.strip()
    if _git("cat-file", "-e", f"{commit}:bench/conftest.py").returncode != 0:
        raise AgainstError(f"{revision} has no benchmarks yet")
    return commit


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="podloom-against-") as directory:
        path = Path(directory, "checkout")
        done = _git("worktree", "add", "--detach", str(path), commit)
        try:
            if done.returncode != 0:
                raise AgainstError(f"git worktree: {done.stderr.strip()}")
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _build(checkout: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {name: value for name, value in os.environ.items() if name != "PODLOOM_DEBUG"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AgainstError(f"it does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _run(checkout: Path, only: str | None) -> dict[str, float]:
    """Medians in seconds, by benchmark."""
    with tempfile.TemporaryDirectory(prefix="podloom-against-") as directory:
        file = Path(directory, "bench.json")
        command = [sys.executable, *PYTEST, f"--benchmark-json={file}", *(("-k", only) if only else ())]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        if not file.exists():
            raise AgainstError(f"no benchmark ran in {checkout}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        entries = json.loads(file.read_text())["benchmarks"]
    return {entry["fullname"]: entry["stats"]["median"] for entry in entries}


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def _print(commit: str, changes: list[Change]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"this checkout against {commit[:12]}")
    for heading in ("benchmark", "then µs", "now µs", "change"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for change in changes:
        colour = ("red" if change.ratio > 1 else "green") if change.is_clear else "dim"
        table.add_row(
            change.name.partition("::")[2].replace("[", r"\["),
            short(change.then * 1e6),
            short(change.now * 1e6),
            f"[{colour}]{change.ratio - 1:+.1%}[/]",
        )
    console.print(table)
    console.print("Medians of each side's rounds, by call. Dim: the rounds of the two sides overlap.")


if __name__ == "__main__":
    sys.exit(main())
