"""ADD and DEL by the real plugin process, one at a time and 200 at once, beside Debian's bridge + host-local.

`python -m pytest bench/bench_cni.py -s`, as root. Both take turns in the same run, so that whatever else the
machine does hits both. Not for pytest-benchmark, which measures one thing after the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cni.load import both, storm
from tests.cni.runtime import debian_plugins
from tests.conftest import root

__all__ = ["root"]  # the fixture

pytestmark = pytest.mark.usefixtures("root")

ROUNDS = 60
STORMS = 10
STATUS_MS = 50  # kubelet asks every few seconds


def test_one_at_a_time(tmp_path: Path) -> None:
    debian_plugins("bridge", "host-local")
    with both(tmp_path, 1) as (_, ours, theirs, pods):
        for _ in range(ROUNDS):
            for plugin in (ours, theirs):
                plugin.call("ADD", pods[0])
                plugin.call("DEL", pods[0])
            ours.call("STATUS", pods[0])  # theirs do not know it
    print(f"\none at a time, {ROUNDS} rounds")
    for plugin in (ours, theirs):
        print(plugin.line())
    assert ours.percentile("ADD", 50) <= 3 * theirs.percentile("ADD", 50)
    assert ours.percentile("DEL", 50) < theirs.percentile("DEL", 50)
    assert ours.percentile("STATUS", 50) < STATUS_MS


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("at_once", [32, 200])
def test_all_at_once(tmp_path: Path, at_once: int) -> None:
    debian_plugins("bridge", "host-local")
    with both(tmp_path, at_once) as (_, ours, theirs, pods):
        for _ in range(STORMS):
            for plugin in (ours, theirs):
                storm(plugin, pods, lambda _: None)
    print(f"\n{at_once} at once, {STORMS} rounds")
    for plugin in (ours, theirs):
        print(plugin.line())
