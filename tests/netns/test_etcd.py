"""Real daemons whose peers come from a real etcd, which comes and goes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forwarder.demo import netns
from forwarder.demo.lab import START_SECONDS, Lab, Node
from forwarder.demo.probes import Station, ping
from tests.netns.labs import new_lab
from tests.netns.nodes import Node as BareNode
from tests.netns.nodes import until

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def etcd() -> None:
    if shutil.which("etcd") is None or shutil.which("etcdctl") is None:
        pytest.skip("no etcd (Debian packages etcd-server, etcd-client): what needs one is NOT tested here")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two nodes with a pod each, that found each other."""
    with new_lab(source="etcd") as lab:
        for _ in range(2):
            lab.add_node()
        lab.start()
        for node, name in zip(lab.nodes, ("a", "b"), strict=True):
            lab.add_pod(node, name)
        until(lambda: peers(lab, lab.nodes[0]) == ["n2"], "n2 at n1")
        until(lambda: peers(lab, lab.nodes[1]) == ["n1"], "n1 at n2")
        yield lab


def peers(lab: Lab, node: Node) -> list[str]:
    return [peer["id"] for peer in lab.ask(node, "peers")]


def discovery(lab: Lab, node: Node) -> dict[str, Any]:
    found: dict[str, Any] = lab.ask(node, "status")["discovery"]
    return found


def pods_ping(lab: Lab, seconds: float) -> tuple[str, ...]:
    """Echoes from pod to pod both ways, ten times a second for so long; those that were lost."""
    one, two = (Station(pod.name, pod.namespace, pod.ips) for pod in lab.pods)
    lost: list[str] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lost += ping([(one, two), (two, one)]).lost
        time.sleep(0.1)
    return tuple(lost)


def test_the_demo_grows_loses_a_node_and_uses_its_prefix_again() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forwarder", "demo", "--source", "etcd", "--nodes", "3", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    names = [check["name"] for check in result["checks"]]
    expected = (
        "a node joins",
        "tables with it",
        "a node dies",
        "its prefix is withheld",
        "its prefix is used again",
    )
    assert [name for name in names if name in expected] == list(expected)
    assert names[-3] == "tables at the end"


@pytest.mark.parametrize(
    "seconds", [4.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.timeout(180)])]
)
def test_traffic_goes_on_while_etcd_is_stopped_and_compacted(lab: Lab, seconds: float) -> None:
    """No ping is lost, and nobody asks in a hot loop; what changed meanwhile and was forgotten is known."""
    one = lab.nodes[0]
    lab.etcd.stop()
    refused, stopped_at = resets(lab), time.monotonic()
    assert pods_ping(lab, seconds) == ()
    requests = (resets(lab) - refused) / (time.monotonic() - stopped_at) / len(lab.nodes)
    print(f"{requests:.1f} requests a second of each node")  # noqa: T201
    assert requests < 4
    away = discovery(lab, one)
    assert lab.etcd.url in away["fault"]
    assert away["unannounced"].startswith("the others are not told of this node")
    assert away["stored"] is False
    assert away["age_seconds"] >= seconds - 1
    assert peers(lab, one) == ["n2"]
    compact(lab)
    lab.etcd.start()
    lab.etcd.wait_ready()
    back_at = time.monotonic()

    def well() -> bool:
        return all(
            (found := discovery(lab, node))["fault"] is None and found["unannounced"] is None
            for node in lab.nodes
        )

    until(well, "recovery", 15.0)
    until(lambda: sorted(peers(lab, one)) == ["ghost", "n2"], "what changed meanwhile", 15.0)
    print(f"re-converged {time.monotonic() - back_at:.1f} s after etcd answered")  # noqa: T201
    assert pods_ping(lab, 1.0) == ()


def compact(lab: Lab) -> None:
    """A node comes, and that it came is forgotten, while nobody sees."""
    lab.etcd.start(hidden=True)
    lab.etcd.wait_ready()
    record = json.loads(lab.etcd.ctl("get", "--print-value-only", "/podloom/nodes/n2"))
    ghost = {"id": "ghost", "endpoints": ["192.0.2.99"], "router_mac": "02:00:00:00:00:99"}
    prefixes = {"prefixes": ["10.71.252.0/22"]}
    lab.etcd.ctl("put", "/podloom/nodes/ghost", json.dumps(record | ghost | prefixes))
    revision = json.loads(lab.etcd.ctl("put", "/elsewhere", "x", "-w", "json"))["header"]["revision"]
    lab.etcd.ctl("compaction", str(revision))
    lab.etcd.stop()


def resets(lab: Lab) -> int:
    """How many connections were refused on etcd's side so far."""
    with netns.inside(lab.wire):
        names, numbers = (
            line.split()
            for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
            if "Tcp:" in line
        )
    return int(numbers[names.index("OutRsts")])


def test_a_daemon_that_starts_without_etcd_goes_on_with_the_peers_of_last_time(lab: Lab) -> None:
    one = lab.nodes[0]
    before = lab.ask(one, "status")["prefixes"]
    lab.etcd.stop()
    daemon = lab.daemon(one)
    daemon.terminate()
    assert daemon.wait(20) == 0
    lab.launch(one)
    lab.wait_ready(one, time.monotonic() + START_SECONDS)
    status = lab.ask(one, "status")
    assert status["prefixes"] == before
    assert status["discovery"]["stored"] is True
    assert 0 < status["discovery"]["age_seconds"] < 120
    command = [sys.executable, "-m", "forwarder", "status", "--socket", str(one.control_socket)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert "1 from etcd, as they were kept on disk" in shown
    assert peers(lab, one) == ["n2"]
    assert pods_ping(lab, 1.0) == ()
    lab.etcd.start()
    lab.etcd.wait_ready()
    until(lambda: discovery(lab, one)["stored"] is False, "etcd's own word", 15.0)
    assert lab.ask(one, "status")["prefixes"] == before


def test_faulty_records_are_shown_with_their_key(lab: Lab) -> None:
    one, two = lab.nodes
    record = json.loads(lab.etcd.ctl("get", "--print-value-only", "/podloom/nodes/n2"))
    thief = record | {"id": "thief", "endpoints": ["192.0.2.66"], "router_mac": "02:00:00:00:00:66"}
    lab.etcd.ctl("put", "/podloom/nodes/thief", json.dumps(thief))
    lab.etcd.ctl("put", "/podloom/nodes/junk", "\x01\x02")

    def fault() -> str:
        return discovery(lab, one)["fault"] or ""

    until(lambda: "nodes/junk" in fault(), "the faults")
    assert f'nodes/thief.prefixes[0] = "{two.prefixes[0]}": must not overlap' in fault()
    assert peers(lab, one) == ["n2"]
    assert pods_ping(lab, 0.5) == ()
    for name in ("thief", "junk"):
        lab.etcd.ctl("del", f"/podloom/nodes/{name}")
    until(lambda: fault() == "", "their departure")


def test_reload_keeps_registration_and_peers(lab: Lab) -> None:
    one = lab.nodes[0]
    one.config_file.write_text(one.config_file.read_text().replace("lease_seconds = 3", "lease_seconds = 4"))
    lab.daemon(one).send_signal(signal.SIGHUP)
    until(lambda: "reloaded: discovery.lease_seconds" in one.log_file.read_text(), "the reload")
    assert peers(lab, one) == ["n2"]
    until(lambda: discovery(lab, one)["unannounced"] is None, "the registration")
    assert pods_ping(lab, 5.0) == ()
    assert peers(lab, lab.nodes[1]) == ["n1"]


def test_a_daemon_that_waits_for_etcd_can_be_stopped(node: BareNode) -> None:
    del node.tables["node"]["prefixes"]
    node.tables["discovery"] = {"source": "etcd", "urls": ["http://192.0.2.1:2379"]}
    node.write_config()
    node.process = node.popen("up")
    until(lambda: "waiting for a prefix" in node.log, "the reason in the log", 20)
    assert node.stop(signal.SIGTERM) == 0
    assert node.namespace.link_names() == {"lo", "eth0", "wire"}
