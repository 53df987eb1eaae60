"""No decision by a clock that somebody sets: leases, quarantines and ages go by CLOCK_BOOTTIME or
CLOCK_MONOTONIC, which do not jump."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.architecture.sources import ROOT, python_files

WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}

FOR_PEOPLE = {
    "cni/cli.py": "since when a pod is attached",
    "forwarder/discovery/kubernetes.py": "the times of a Node's condition",
    "forwarder/follower.py": "when the peers on disk were written, and how old they are",
}
"""Where wall time is written down or shown; nothing is decided by it."""


def wall_clocks(path: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in WALL
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_wall_time_is_for_people_only() -> None:
    product = [path for path in python_files("forwarder", "cni") if "demo" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in product if wall_clocks(path)} == set(FOR_PEOPLE)


def test_they_are_found(tmp_path: Path) -> None:
    for text in ("now = time.time()", "clock = time.time", "datetime.now(UTC)"):
        (tmp_path / "file.py").write_text(text)
        assert wall_clocks(tmp_path / "file.py")
    (tmp_path / "file.py").write_text("time.monotonic()")
    assert not wall_clocks(tmp_path / "file.py")
