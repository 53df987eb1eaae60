"""What more than one folder of tests needs. A capability that is missing skips with its name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns_tools import Namespace, make_netns, remove_netns


def pytest_configure() -> None:
    # A shell's background job is started with SIGINT ignored, and all that it starts would be, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> None:
    """Root in this machine's network."""
    if os.geteuid() != 0:
        pytest.skip("not root: what needs network namespaces is NOT tested in this run")


@pytest.fixture(scope="session")
def tun(root: None) -> None:
    """Root and /dev/net/tun."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun: what needs a TAP is NOT tested in this run")


@pytest.fixture
def netns(root: None) -> Iterator[Callable[[], Namespace]]:
    """Makes network namespaces; all are gone after the test."""
    with ExitStack() as undo:

        def make() -> Namespace:
            namespace = make_netns()
            undo.callback(remove_netns, namespace)
            return namespace

        yield make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that passing tests recorded, which pytest only writes into XML."""
    figures = [
        f"{report.nodeid}: {name}: {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("figures")
    for line in figures:
        terminalreporter.write_line(line)
