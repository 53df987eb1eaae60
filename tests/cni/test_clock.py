"""The host's time jumps: nothing is over early, and nothing lasts for ever."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

import pytest

from cni.netconf import QUARANTINE_S
from cni.service import boot_clock
from cni.store import FILE_NAME
from tests.cni.conftest import Answer, Namespaces, Node

pytestmark = pytest.mark.root

DAY = 86_400.0


def gc(node: Node, *pods: str) -> Answer:
    valid: list[Any] = [{"containerID": pod, "ifname": "eth0"} for pod in pods]
    conf = node.conf("1.1.0") | {"cni.dev/valid-attachments": valid}
    return Answer.of(*node.handle({"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}, json.dumps(conf)))


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["a day ahead", "a day back"])
def test_a_jump_of_the_hosts_time(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    kept, gone = namespaces.new(), namespaces.new()
    for pod in (kept, gone):
        node.call("ADD", pod)
    node.call("DEL", gone)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    assert gc(node, kept).exit == 0
    assert [container for _, container, _ in node.records()] == [kept]
    assert gc(node).exit == 0
    assert node.records() == []
    database = sqlite3.connect(node.state_dir / FILE_NAME)
    rests = [until for (until,) in database.execute("SELECT rests_until FROM addresses")]
    database.close()
    assert len(rests) == 4  # of two pods, of two families
    assert all(0 < until - boot_clock() <= QUARANTINE_S for until in rests)
