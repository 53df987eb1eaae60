"""`make compare`: parse, measure, print the table, write the files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import compiled, machine
from bench.compare import options, report, wire
from bench.compare.systems import SYSTEMS

FILE_WIDTH = 140
PROGRAMS = {"iperf3": "iperf3", "ip": "iproute2", "bridge": "iproute2"}


def main() -> int:
    chosen = options.parse(sys.argv[1:], SYSTEMS)
    errors = Console(stderr=True, highlight=False)
    try:
        _require()
        chosen.output.mkdir(parents=True, exist_ok=True)
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        compiled.install("bench.compare.load")
    except (machine.UnfitBuildError, OSError) as error:
        errors.print(f"make compare: {escape(str(error))}", soft_wrap=True)
        return 1
    return _compare(chosen, errors)


def _compare(chosen: options.Options, errors: Console) -> int:
    from bench.compare.session import Session  # not before load.pyx is compiled

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = datetime.now(UTC)
    interrupted = False
    with _interruptible(), Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("")
        session = Session(
            chosen,
            tell=lambda line: errors.print(escape(line), soft_wrap=True),
            step=lambda what, done: progress.update(task, description=escape(what), completed=done),
        )
        progress.update(task, total=session.steps)
        try:
            session.run()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        errors.print("interrupted; everything it made is removed, and this is what was measured")
    comparison = report.Comparison(
        host=machine.describe()
        | {
            "versions": machine.program_versions(),
            "began": began.isoformat(timespec="seconds"),
            "rounds": chosen.rounds,
            "seconds": chosen.seconds,
            "busy_when_idle": session.busy_when_idle,
            "generator_packets_per_second": session.generator,
        },
        rows=report.make_rows(session.samples),
        troubles=session.troubles,
    )
    _print(comparison)
    _write(chosen, comparison)
    if interrupted:
        return 130
    failed = [
        trouble for trouble in session.troubles if trouble.metric or not SYSTEMS[trouble.system].optional
    ]
    return 1 if failed or not session.samples else 0


def _require() -> None:
    machine.refuse_unfit_build()
    if os.geteuid() != 0:
        raise OSError("network namespaces and TAP devices need root: run it again with sudo")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise OSError(f"{program} is not installed (Debian package {package})")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end it as Ctrl-C does: by unwinding."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _print(comparison: report.Comparison) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for grid in report.make_grids(comparison):
        table = Table(title=f"wire {grid.wire}: {wire.ABOUT[grid.wire]} ({grid.title})", show_lines=True)
        table.add_column("", no_wrap=True)
        for heading in grid.headings:
            table.add_column(heading, justify="right")
        for system, cells in grid.lines:
            table.add_row(system, *("\n".join(cell) for cell in cells))
        console.print(table)
    for trouble in comparison.troubles:
        console.print(escape(f"not measured: {report.sentence(trouble)}"), soft_wrap=True)
    console.print(f"{report.legend(comparison.host)} {report.CAVEAT}")


def _write(chosen: options.Options, comparison: report.Comparison) -> None:
    about = {name: system.about for name, system in SYSTEMS.items()}
    files = {
        chosen.output / "compare.md": report.markdown(comparison, wire.ABOUT, about),
        chosen.output / "compare.svg": report.plot(comparison),
        chosen.json: json.dumps(report.as_json(comparison), indent=2, ensure_ascii=False) + "\n",
    }
    for path, text in files.items():
        path.write_text(text)
    sys.stdout.write(f"written: {', '.join(str(path) for path in files)}\n")


if __name__ == "__main__":
    sys.exit(main())
