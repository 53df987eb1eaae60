from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forwarder import cli, config, views

REPOSITORY = Path(__file__).resolve().parents[2]


def podloom(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "forwarder", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=REPOSITORY,
    )


def test_example_is_what_a_first_user_gets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--example"]) == 0
    assert capsys.readouterr().out == config.example()


def test_effective_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "podloom.toml"
    path.write_text(config.example())
    assert cli.main(["config", "-c", str(path)]) == 0
    assert config.parse(capsys.readouterr().out) == config.parse(config.example())


@pytest.mark.parametrize("command", [["config"], ["up"], ["status"], ["peers", "--json"]])
def test_every_fault_is_on_stderr_and_the_status_is_2(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "podloom.toml"
    path.write_text("[cluster]\nvni = -1\n[tunel]\n")
    done = podloom(*command, "-c", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert all(re.match(rf"podloom: (ERROR: )?{re.escape(str(path))}: \S+ ", line) for line in lines)
    assert any("cluster.vni = -1: must be an integer from 0 to 16777215" in line for line in lines)


def test_an_absent_file_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "-c", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == (
        f"podloom: {tmp_path}/absent: cannot be read: No such file or directory; must be a TOML file "
        "(podloom config --example)\n"
    )


def test_no_daemon_says_what_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json", "--socket", str(tmp_path / "control.sock")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"podloom: no podloom answers on {tmp_path}/control.sock: start it with `podloom up`\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (["--version"], r"^podloom \S+\n$"), (["--help"], "status.*peers.*drops.*demo"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        assert re.search(expected, capsys.readouterr().out, re.DOTALL)


def test_asking_imports_neither_netlink_nor_the_demo(tmp_path: Path) -> None:
    """`podloom status` is run in loops and by probes: it must start fast."""
    program = (
        "import sys; from forwarder import cli; "
        f"cli.main(['status', '--json', '--socket', {str(tmp_path / 'absent')!r}]); "
        "print(*{name.split('.')[0] for name in sys.modules}, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    heavy = {
        "pyroute2",
        "rich",
        "uvloop",
        "asyncio",
        "fastpath",
        "tomllib",
        "forwarder.demo",
        "forwarder.daemon",
    }
    assert heavy.isdisjoint(done.stdout.split())


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "forwarder", "config", "--example"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=REPOSITORY,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


STATUS: dict[str, Any] = {
    "node_id": "n1",
    "version": "1",
    "uptime_seconds": 93784.0,
    "endpoints": ["192.0.2.1"],
    "prefixes": ["10.42.1.0/24"],
    "router_mac": "02:00:00:00:00:01",
    "gateway_mac": "02:00:00:00:00:02",
    "links": {"bridge": "loom0", "tap": "loom-tap"},
    "mtu": 1450,
    "encapsulation": "geneve",
    "vni": 1,
    "ports": {"geneve": 6081, "vxlan": []},
    "peers": 0,
    "fault": None,
    "discovery": {
        "source": "static",
        "stored": False,
        "age_seconds": None,
        "fault": "peer[0].id: [links] [/bold]",
        "unannounced": "the others are not told of this node: [etcd]",
    },
    "bgp": {"fault": "BIRD [bird.ctl] cannot be reached"},
    "counters": {
        "encap": {"received": 1234567, "forwarded": 1, "forwarded_bytes": 2},
        "decap": {"received": 0, "forwarded": 0, "forwarded_bytes": 0},
    },
    "offloads": {"tap_checksum": {"on": False, "reason": "the kernel lacks it"}},
}


def test_status_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    views.show("status", STATUS)
    shown = capsys.readouterr().out
    for expected in (
        "up 1 d 2 h",
        "geneve 6081, vxlan none",
        "0 from static, never known",
        "the others are not told of this node: [etcd]",
        "off: the kernel lacks it",
        "BIRD [bird.ctl] cannot be reached",
        "the peers are not up to date: peer[0].id: [links] [/bold]",
        "1,234,567",
    ):
        assert expected in shown


@pytest.mark.parametrize(
    ("verb", "answer", "shown"),
    [
        ("peers", [], "no peers\n"),
        ("drops", {"encap": {"no_route": 0}, "decap": {}}, "nothing was dropped\n"),
        ("drops", {"encap": {"no_route": 3, "too_big": 0}, "decap": {}}, "no_route"),
    ],
)
def test_little_to_show_is_said(
    capsys: pytest.CaptureFixture[str], verb: str, answer: Any, shown: str
) -> None:
    views.show(verb, answer)
    out = capsys.readouterr().out
    assert shown in out
    assert "too_big" not in out


def test_a_long_peer_list_is_not_folded_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    peer: dict[str, Any] = {
        "id": "a-node-with-quite-a-long-name.example",
        "endpoint": "2001:db8:1234:5678:9abc:def0:1234:5678",
        "encapsulation": "geneve",
        "port": 6081,
        "prefixes": ["fd42:1234:5678:9abc::/64"],
        "path": "tunnel",
        "why": "2001:db8::1 is on another segment, reached by way of 2001:db8:1234:5678:9abc:def0:1234:ffff",
        "path_mtu": None,
        "health": {"state": "not probed"},
        "counters": dict.fromkeys(
            ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes"), 123456789012
        ),
    }
    peer["health"] = DOWN
    views.show("peers", [peer])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a-node" in line]
    health = "down 2 h 0 min: nothing is heard of it"
    for expected in (
        peer["id"],
        peer["endpoint"],
        "fd42:1234:5678:9abc::/64",
        peer["why"],
        "123,456,789,012",
        health,
    ):
        assert expected in line


DOWN: dict[str, Any] = {
    "state": "down",
    "fault": "nothing is heard of it",
    "since_seconds": 7200.5,
    "rtt_seconds": 0.0004,
    "smoothed_rtt_seconds": 0.0005,
    "encap_loss": None,
    "decap_loss": 1.0,
}
UNKNOWN: dict[str, Any] = {**dict.fromkeys(DOWN), "state": "unknown", "since_seconds": 0.5}
UP: dict[str, Any] = {
    **DOWN,
    "state": "up",
    "fault": None,
    "since_seconds": 61.0,
    "encap_loss": 0.0,
    "decap_loss": 0.015625,
}


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        ({"state": "not probed"}, ["not probed"]),
        (UNKNOWN, ["unknown 0 s"]),
        (UP, ["up 1 min 1 s", "0.50 ms", "0 %/2 %"]),
        (DOWN, ["down 2 h 0 min: nothing is heard of it", "0.50 ms", "?/100 %"]),
    ],
    ids=["not probed", "unknown", "up", "down"],
)
def test_health_for_a_person(
    capsys: pytest.CaptureFixture[str], health: dict[str, Any], expected: list[str]
) -> None:
    peer = {
        "id": "n2",
        "endpoint": "192.0.2.2",
        "encapsulation": "geneve",
        "port": 6081,
        "prefixes": ["10.42.2.0/24"],
        "path": "tunnel",
        "why": "off",
        "path_mtu": None,
        "health": health,
        "counters": dict.fromkeys(("encap_packets", "encap_bytes", "decap_packets", "decap_bytes"), 0),
    }
    views.show("peers", [peer])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in expected)
    assert "path MTU" not in shown


def test_ways_are_told_once_or_beside_each_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    ways = {
        "10.42.2.0/24": {"path": "direct", "why": "on-link by eth0"},
        "fd42:0:0:2::/64": {"path": "tunnel", "why": "no endpoint"},
    }
    mixed: dict[str, Any] = {
        "id": "n2",
        "endpoint": "192.0.2.2",
        "encapsulation": "geneve",
        "port": 6081,
        "prefixes": list(ways),
        "path": "mixed",
        "paths": ways,
        "path_mtu": None,
        "health": {"state": "not probed"},
        "counters": dict.fromkeys(("encap_packets", "encap_bytes", "decap_packets", "decap_bytes"), 0),
    }
    alike = mixed | {"id": "n3", "path": "bgp", "why": "a route"}
    views.show("peers", [mixed, alike])
    _, first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert ("10.42.2.0/24" in first, "direct: on-link by eth0" in first) == (True, True)
    assert ("fd42:0:0:2::/64" in second, "tunnel: no endpoint" in second) == (True, True)
    assert ("bgp: a route" in third, "bgp" in fourth) == (True, False)
