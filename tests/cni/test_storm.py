"""Many pods at once, by real plugin processes and a real daemon; figures stand beside the reference's."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from cni.store import FILE_NAME
from tests.cni.load import both, storm
from tests.cni.runtime import debian_plugins

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("pods", "rounds"),
    [pytest.param(24, 2, id="small"), pytest.param(200, 10, id="whole", marks=pytest.mark.slow)],
)
def test_parallel_calls_lose_and_leak_nothing(
    root: None, tmp_path: Path, pods: int, rounds: int, record_property: Any
) -> None:
    debian_plugins("bridge", "host-local")
    with both(tmp_path, pods) as (node, ours, theirs, names):
        links = node.namespace.link_names()

        def unique(results: list[Any]) -> None:
            addresses = [ip["address"] for result in results for ip in result["ips"]]
            assert len(set(addresses)) == len(addresses) == pods

        for _ in range(rounds):
            storm(ours, names, unique)
            storm(theirs, names, unique)
        assert node.namespace.link_names() == links
        database = sqlite3.connect(tmp_path / "n1" / "state" / FILE_NAME)
        held = database.execute("SELECT count(*) FROM addresses WHERE rests_until IS NULL").fetchone()
        records = database.execute("SELECT count(*) FROM attachments").fetchone()
        database.close()
        assert (held, records) == ((0,), (0,))
    for plugin in (ours, theirs):
        record_property(f"{pods} at once, {rounds} rounds", plugin.line())
