"""Nodes that are cut off from what tells them of each other, while the network between them is sound."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forwarder.demo.lab import START_SECONDS, Lab, LabError, Node, popen
from forwarder.demo.probes import Station, ping
from tests import kube_api
from tests.netns.labs import new_lab
from tests.netns.nodes import until
from tests.netns.test_etcd import discovery, etcd, peers
from tests.netns.test_flannel import api_server, kubeconfig

__all__ = ["etcd"]  # the fixture that skips where there is none

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("tun"),
]

SILENCE_SECONDS = 60.0
"""So soon a connection that is dead without a word is to be noticed."""


@contextmanager
def cut(node: Node, port: int, connections: str = "") -> Iterator[None]:
    """Packets between a node and a server's port go nowhere, and no reset comes back; of some connections
    only, if their ports on the node are given, as behind a firewall that has forgotten them."""
    there = f"tcp sport {{ {connections} }}" if connections else ""
    back = f"tcp dport {{ {connections} }}" if connections else ""
    rules = f"""
table inet cut {{
  chain there {{ type filter hook output priority 0; {there} tcp dport {port} drop; }}
  chain back {{ type filter hook input priority 0; {back} tcp sport {port} drop; }}
}}
"""
    nft(node, rules)
    try:
        yield
    finally:
        nft(node, "delete table inet cut")


def nft(node: Node, rules: str) -> None:
    with popen(node.namespace, ["nft", "-f", "-"], stdin=subprocess.PIPE) as process:
        process.communicate(rules.encode())
    assert process.returncode == 0


def connections(node: Node, port: int) -> str:
    """The node's ports of its connections to a server's port."""
    words = ["ss", "-Htn", "state", "established", "dport", "=", f":{port}"]
    with popen(node.namespace, words, stdout=subprocess.PIPE) as process:
        output, _ = process.communicate()
    lines = output.decode().splitlines()
    return ", ".join(line.split()[2].rpartition(":")[2] for line in lines)


def claims_all_but(lab: Lab, free: int) -> list[Any]:
    """Reserve every prefix that is free but so many; those left free."""
    prefix = lab.nodes[0].prefixes[0]
    pool = prefix.supernet(lab.etcd.PREFIXES.bit_length() - 1)
    unclaimed = [one for one in pool.subnets(new_prefix=prefix.prefixlen) if one not in lab.etcd.claims()]
    for one in unclaimed[free:]:
        lab.etcd.reserve(one)
    return unclaimed[:free]


def test_a_prefix_has_one_owner_through_a_partition() -> None:
    """Who is cut off fences itself before its prefix is another's, says so, and takes nothing back."""
    with new_lab(source="etcd") as lab:
        loser, observer = lab.add_node(), lab.add_node()
        lab.start()
        lab.add_pod(loser, "a")
        pod = lab.add_pod(observer, "b")
        until(lambda: peers(lab, observer) == [loser.name], "the node that will be cut off")
        prefix = loser.prefixes[0]
        claims_all_but(lab, 0)

        def owners() -> list[str]:
            """Whom the observer sends to for the prefix."""
            found = lab.ask(observer, "peers")
            return [peer["id"] for peer in found if str(prefix) in peer["prefixes"]]

        with cut(loser, 2379):
            cut_at = time.monotonic()
            until(lambda: discovery(lab, loser)["unannounced"], "its word that it is cut off", 20)
            print(f"noticed after {time.monotonic() - cut_at:.1f} s")  # noqa: T201
            until(lambda: owners() == [], "its end as a peer", 20)
            heir = lab.add_node()
            lab.launch(heir)
            lab.wait_ready(heir, time.monotonic() + 3 * lab.etcd.HOLD_SECONDS + START_SECONDS)
            assert heir.prefixes[0] == prefix
            assert discovery(lab, loser)["fenced"] is True, "before the heir has it"
            until(lambda: owners() == [heir.name], "the heir")
            with pytest.raises(LabError, match=r'"code":11,.*no pods are added'):
                lab.add_pod(loser, "refused")
        until(lambda: f"{heir.name} has {prefix}" in discovery(lab, loser)["unannounced"], "its word", 20)
        assert discovery(lab, loser)["fenced"] is True
        assert lab.etcd.claims()[prefix] == heir.name
        for _ in range(20):
            assert owners() == [heir.name]
            time.sleep(0.1)
        newcomer = lab.add_pod(heir, "c")
        both = [Station(one.name, one.namespace, one.ips) for one in (pod, newcomer)]
        assert ping([(both[0], both[1]), (both[1], both[0])]).lost == ()

        other = next(one for one, owner in lab.etcd.claims().items() if owner == "nobody")
        lab.etcd.ctl("del", f"/podloom/prefixes/{str(other).replace('/', '-')}")
        daemon = lab.daemon(loser)
        daemon.terminate()
        assert daemon.wait(20) == 0
        lab.launch(loser)
        lab.wait_ready(loser, time.monotonic() + START_SECONDS)
        assert loser.prefixes[0] == other
        assert discovery(lab, loser)["fenced"] is False
        again = lab.add_pod(loser, "d")
        station = Station(again.name, again.namespace, again.ips)
        assert ping([(both[0], station), (both[1], station)]).lost == ()


def test_connections_to_etcd_that_are_dead_without_a_word() -> None:
    with new_lab(source="etcd") as lab:
        one, two = lab.add_node(), lab.add_node()
        lab.start()
        until(lambda: peers(lab, one) == [two.name], "the second node")
        dead = connections(one, 2379)
        assert dead
        with cut(one, 2379, dead):
            cut_at = time.monotonic()
            record = json.loads(lab.etcd.ctl("get", "--print-value-only", "/podloom/nodes/n2"))
            late = record | {
                "id": "late",
                "endpoints": ["192.0.2.99"],
                "prefixes": ["10.71.252.0/22"],
                "router_mac": "02:00:00:00:00:99",
            }
            lab.etcd.ctl("put", "/podloom/nodes/late", json.dumps(late))
            until(lambda: "late" in peers(lab, one), "what changed since", SILENCE_SECONDS)
            print(f"etcd: noticed after {time.monotonic() - cut_at:.1f} s")  # noqa: T201
            until(lambda: discovery(lab, one)["unannounced"] is None, "its registration", 20)


PATCH = """
import json, sys, urllib.request
url, annotations = sys.argv[1:]
body = json.dumps({"metadata": {"annotations": json.loads(annotations)}}).encode()
kind = {"Content-Type": "application/strategic-merge-patch+json"}
urllib.request.urlopen(urllib.request.Request(url, body, kind, method="PATCH"))
"""


def test_connections_to_the_api_server_that_are_dead_without_a_word() -> None:
    with new_lab() as lab:
        ours = lab.add_node()
        file = ours.directory / "nodes.json"
        others = {
            "podloom.dev/endpoints": "192.0.2.99",
            "podloom.dev/router-mac": "02:00:00:00:00:99",
            "podloom.dev/encapsulation": "geneve",
            "podloom.dev/port": "6081",
            "podloom.dev/vni": "71",
        }
        nodes = {
            "ours": kube_api.node("ours", "10.71.1.0/24"),
            "two": kube_api.node("two", "10.71.2.0/24", annotations=others),
        }
        file.write_text(json.dumps(nodes))
        with api_server(lab, file) as url:
            lab.launch(ours, config(ours, kubeconfig(ours)))
            lab.wait_ready(ours, time.monotonic() + START_SECONDS)
            until(lambda: peers(lab, ours) == ["two"], "the other node")
            dead = connections(ours, 8080)
            assert dead
            with cut(ours, 8080, dead):
                cut_at = time.monotonic()
                words = json.dumps({"podloom.dev/port": "6082"})
                command = [sys.executable, "-c", PATCH, f"{url}/api/v1/nodes/two/status", words]
                assert popen(lab.wire, command).wait(20) == 0
                until(lambda: lab.ask(ours, "peers")[0]["port"] == 6082, "what changed", SILENCE_SECONDS)
                print(f"Kubernetes: noticed after {time.monotonic() - cut_at:.1f} s")  # noqa: T201


def config(ours: Node, file: Path) -> str:
    return f"""
[cluster]
cidrs = ["10.71.0.0/16"]
vni = 71
[node]
endpoints = ["{ours.underlay["ipv4"]}"]
state_dir = "{ours.directory}/state"
run_dir = "{ours.control_socket.parent}"
ip_masquerade = false
[discovery]
source = "kubernetes"
kubeconfig = "{file}"
node_name = "ours"
"""
