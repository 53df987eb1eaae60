"""`podloom demo` as a person or a script runs it: what it says, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from forwarder.demo import cli, lab, netns, session
from forwarder.demo.checks import Check, Checks, Outcome
from forwarder.demo.lab import netlink
from tests.netns.labs import new_lab

ROOT = Path(__file__).parents[2]
SECONDS = 90

Test = TypeVar("Test", bound=Callable[..., None])


def root(test: Test) -> Test:
    marked: Test = pytest.mark.root(pytest.mark.usefixtures("tun")(test))
    return marked


@contextmanager
def demo(*arguments: str, machine: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """The demo under way. `machine`: a namespace that stands for the machine it runs on."""
    machine = machine or Path("/proc/thread-self/ns/net")
    with netns.inside(machine):
        process = subprocess.Popen(
            [sys.executable, "-m", "forwarder", "demo", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: str) -> tuple[int, Any, str]:
    """Exit status, the object on stdout, what was said on stderr."""
    with demo(*arguments, "--json") as process:
        output, errors = process.communicate(timeout=SECONDS)
    return process.returncode, json.loads(output), errors


def leftovers(name: str) -> list[str]:
    """What is still there of a demo: namespaces, files, processes."""
    directory = str(lab.directory_of(name))
    found = netns.names(f"{name}-")
    found += [directory] if Path(directory).exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if directory.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue  # it ended while we looked
    return found


def links(namespace: Path) -> set[str]:
    with netlink(namespace) as ip:
        return {link.get_attr("IFLA_IFNAME") for link in ip.get_links()}


@root
@pytest.mark.parametrize("underlay", ["ipv4", "ipv6"])
@pytest.mark.parametrize("encapsulation", ["geneve", "vxlan"])
def test_every_check_holds(encapsulation: str, underlay: str) -> None:
    with new_lab() as around:
        machine = around.add_namespace("machine")
        before = links(machine)
        with demo("--json", "--encap", encapsulation, "--underlay", underlay, machine=machine) as process:
            output, errors = process.communicate(timeout=SECONDS)
        assert links(machine) == before
    assert process.returncode == 0, output + errors
    result = json.loads(output)
    assert result["ok"]
    assert errors == ""
    assert (result["nodes"], result["encapsulation"], result["underlay"]) == (2, encapsulation, underlay)
    assert sorted(pod["name"] for pod in result["pods"]) == ["p1", "p2", "p3", "p4"]
    assert all(len(pod["ips"]) == 2 for pod in result["pods"])
    # Pods to pods, pods to nodes and back, each over IPv4 and IPv6; then the moved one and all others.
    assert result["ping"]["sent"] == result["ping"]["received"] == 2 * (4 * 3 + 2 * 4 * 2 + 2 * (3 + 2))
    assert result["tcp"]["bytes"] == 4 * (32 << 20)
    assert result["tcp"]["hash_ok"] is True
    assert result["tcp"]["gbps"] > 0
    assert result["udp"] == {"sent": 20, "received": 20}
    assert all(check["ok"] and check["detail"] for check in result["checks"])
    # Where nothing is wrong nothing is dropped.
    assert result["drops"] == {"n1": {}, "n2": {}}
    assert leftovers(f"demo-{process.pid:x}") == []


@root
def test_three_nodes_with_three_pods_each() -> None:
    status, result, _ = run("--nodes", "3", "--pods", "3")
    assert (status, result["ok"]) == (0, True)
    assert [pod["node"] for pod in result["pods"]] == ["n1"] * 2 + ["n2"] * 3 + ["n3"] * 4
    assert result["ping"]["sent"] == result["ping"]["received"]
    assert result["tcp"]["hash_ok"]


@root
@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("nodes", signal.SIGINT),
        ("pods", signal.SIGINT),
        ("ping across nodes", signal.SIGTERM),
        ("TCP IPv4", signal.SIGINT),
    ],
)
def test_an_interrupt_leaves_nothing(after: str, number: signal.Signals) -> None:
    with demo() as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"ok {after}:"):
                break
        process.send_signal(number)
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert (output, errors.splitlines()[-1]) == (
        "",
        "podloom demo: interrupted; everything it made is removed",
    )
    assert leftovers(f"demo-{process.pid:x}") == []


@root
def test_a_person_sees_tables() -> None:
    with demo() as process:
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "every check held" in output
    assert errors.startswith("ok nodes: 2 daemons answer")


@root
def test_a_kept_demo_runs_until_it_is_removed() -> None:
    status, result, _ = run("--keep")
    name = result["kept_as"]
    try:
        assert (status, result["ok"]) == (0, True)
        config_file = lab.directory_of(name) / "n1" / "podloom.toml"
        assert podloom("status", "-c", str(config_file), "--json").returncode == 0
    finally:
        removed = podloom("demo", "--remove", name)
    assert (removed.returncode, removed.stderr) == (0, "")
    assert leftovers(name) == []

    again = podloom("demo", "--remove", name)
    assert again.returncode == 1
    assert again.stderr.startswith(f"podloom demo: there is no demo named '{name}'")


@root
def test_a_demo_that_was_killed_can_be_removed() -> None:
    with demo() as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("ok nodes")
        os.kill(process.pid, signal.SIGKILL)
    name = f"demo-{process.pid:x}"
    assert leftovers(name) != []
    assert podloom("demo", "--remove", name).returncode == 0
    assert leftovers(name) == []


@root
def test_a_dead_daemon_is_a_failed_check() -> None:
    """The demo can fail: a node whose daemon died loses the pings across nodes, and no others."""
    told: list[Check] = []
    outcome = Outcome(nodes=2, encapsulation="geneve", underlay="ipv4")
    with new_lab() as made:
        checks = Checks(made, outcome, told.append)
        checks.start_nodes()
        checks.attach_pods(2)
        made.daemon(made.nodes[1]).kill()
        checks.ping_pods()
    assert [(check.name, check.ok) for check in told[2:]] == [
        ("ping across nodes", False),
        ("ping on one node", True),
    ]
    assert told[2].detail.startswith("0 of 16 sent at once came back")
    assert not outcome.ok


def test_not_root_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert in_process("--json") == 1
    said = capsys.readouterr()
    assert said.err == "podloom demo: network namespaces and TAP devices need root: run it again with sudo\n"
    assert json.loads(said.out)["ok"] is False


def test_no_tun_device_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(session, "TUN_DEVICE", tmp_path / "tun")
    assert in_process() == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"podloom demo: there is no {tmp_path}/tun: ")
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nodes", "1"),
        ("--nodes", "51"),
        ("--nodes", "two"),
        ("--pods", "0"),
        ("--pods", "-1"),
        ("--encap", "gre"),
        ("--underlay", "ipv5"),
        ("--source", "gossip"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        in_process(*arguments)
    assert arguments[0] in capsys.readouterr().err


def test_one_failed_check_is_not_ok() -> None:
    good, bad = Check("good", True, "held"), Check("bad", False, "did not hold")
    assert Outcome(2, "geneve", "ipv4", checks=[good]).ok
    assert not Outcome(2, "geneve", "ipv4", checks=[good, bad]).ok
    assert not Outcome(2, "geneve", "ipv4", checks=[]).ok
    assert not Outcome(2, "geneve", "ipv4", checks=[good], error="it broke").ok


def podloom(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forwarder", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def in_process(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))
