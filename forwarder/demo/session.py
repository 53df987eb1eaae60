"""One run of the demo: build a lab, prove that its pods talk, tell, and leave nothing behind."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forwarder.demo import lab as labs
from forwarder.demo import report
from forwarder.demo.checks import Checks, Outcome
from forwarder.demo.lab import Lab, LabError

TUN_DEVICE = Path("/dev/net/tun")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0 if every check held, 1 if not, 130 if it was interrupted."""
    try:
        _require_privileges()
        if arguments.remove is not None:
            labs.remove(arguments.remove)
            return 0
    except LabError as error:
        report.print_error(str(error))
        if arguments.json:
            report.print_json({"ok": False, "error": str(error)})
        return 1

    outcome = Outcome(arguments.nodes, arguments.encap, arguments.underlay, arguments.source)
    began = time.monotonic()
    try:
        with _interruptible():
            _demonstrate(outcome, arguments)
    except LabError as error:  # there is no lab at all
        outcome.error = str(error)
    except KeyboardInterrupt:
        report.print_error("interrupted; everything it made is removed")
        return 130
    outcome.seconds = time.monotonic() - began

    if outcome.error is not None:
        report.print_error(outcome.error)
    if arguments.json:
        report.print_json(report.as_json(outcome))
        return 0 if outcome.ok else 1
    report.print_tables(outcome)
    if (name := outcome.kept_as) is not None:
        namespace = f"{name}-{outcome.pods[0].name}" if outcome.pods else f"{name}-wire"
        config_file = labs.directory_of(name) / "n1" / "podloom.toml"
        report.print_how_to_look(_own_command(), name, str(config_file), namespace)
    return 0 if outcome.ok else 1


def _demonstrate(outcome: Outcome, arguments: argparse.Namespace) -> None:
    name = f"demo-{os.getpid():x}"
    progress = report.Progress(quiet=arguments.json)
    options = {"encapsulation": arguments.encap, "underlay": arguments.underlay, "source": arguments.source}
    with Lab(name, **options) as lab:
        try:
            for what, step in Checks(lab, outcome, progress.done).steps(arguments.pods):
                with progress.step(what):
                    step()
        except (LabError, OSError) as error:
            outcome.error = str(error)
        outcome.pods = list(lab.pods)
        if arguments.keep:  # also when a check failed: that is when one wants to look
            outcome.kept_as = name
            lab.keep()


def _require_privileges() -> None:
    if os.geteuid() != 0:
        raise LabError("network namespaces and TAP devices need root: run it again with sudo")
    if not TUN_DEVICE.is_char_device():
        raise LabError(f"there is no {TUN_DEVICE}: load the tun module, or give this container the device")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: by unwinding."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _own_command() -> str:
    """How this program was called, to say how to call it again."""
    called = sys.argv[0]
    return called if Path(called).name == "podloom" else f"{shlex.quote(sys.executable)} -m forwarder"
