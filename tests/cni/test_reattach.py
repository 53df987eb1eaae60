"""Pods that run, on a node whose MTU or bridge has become another. How it is found out is the daemon's
(tests/netns/test_node_changes.py)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from cni import commands, netns
from cni.netlink import Link
from cni.reattach import mtu_of
from cni.service import NodeNetwork
from tests.cni.conftest import NETWORK as MADE
from tests.cni.conftest import Namespaces, Node, links_of, sh

NETWORK = NodeNetwork("loom0", 1450, (), (), ())
PORT = Link(7, "pl0", "veth", "", 0, True, "", 3, 2, True, True)


@pytest.mark.parametrize(
    ("port", "before", "now", "expected"),
    [
        (1450, 1450, 1350, 1350),
        (1450, 1450, 8950, 8950),
        (1300, 1450, 8950, 1300),
        (1400, 1450, 1350, 1350),
        (1450, 1450, 1450, 1450),
    ],
    ids=["lowered", "raised", "asked for less", "asked for less, and still too much", "the same"],
)
def test_the_mtu_of_a_pods_link(port: int, before: int, now: int, expected: int) -> None:
    assert (
        mtu_of(replace(PORT, mtu=port), replace(NETWORK, mtu=before), replace(NETWORK, mtu=now)) == expected
    )


def reattach(node: Node, network: NodeNetwork) -> list[str]:
    return netns.call_in(node._netns, node.service.reattach, network)


@pytest.mark.root
def test_pods_follow_the_nodes_mtu(node: Node, namespaces: Namespaces) -> None:
    usual, small = namespaces.new(), namespaces.new()
    node.call("ADD", usual)
    node.call("ADD", small, node.conf(mtu=1300))
    for mtu, segments, expected in ((1350, 47, {1350, 1300}), (1290, 49, {1290}), (8950, 7, {8950})):
        sh("ip", "-n", node.name, "link", "set", "loom0", "mtu", str(mtu))
        assert reattach(node, replace(MADE, mtu=mtu, gso_max_segs=segments)) == []
        pods = [links_of(pod)["eth0"] for pod in (usual, small)]
        ports = [link for link in node.links().values() if link.get("master") == "loom0"]
        assert {link["mtu"] for link in pods} == {link["mtu"] for link in ports} == expected
        assert pods[0]["gso_max_segs"] == segments


@pytest.mark.root
def test_pods_get_a_new_bridge(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    name = node.call("ADD", pod).body["interfaces"][0]["name"]
    sh("ip", "-n", node.name, "link", "del", "loom0")
    assert reattach(node, MADE) == ["pods are not attached: the bridge loom0 is missing"]
    sh("ip", "-n", node.name, "link", "add", "loom0", "type", "bridge")
    assert reattach(node, MADE) == []
    port = node.links()[name]
    assert (port["master"], port["linkinfo"]["info_slave_data"]["isolated"]) == ("loom0", True)


@pytest.mark.root
def test_a_pod_that_is_nowhere_to_be_found_is_told(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    node.call("ADD", pod)
    held = os.open(f"/run/netns/{pod}", os.O_RDONLY)  # It lives on without a name or a process.
    try:
        sh("ip", "netns", "del", pod)
        (fault,) = reattach(node, replace(MADE, mtu=1350))
        assert f"nowhere to be found: {pod}/eth0" in fault
    finally:
        os.close(held)


@pytest.mark.root
def test_an_add_that_is_under_way_is_not_overlooked(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = commands.add

    def slow_add(*given: Any) -> Any:
        made = add(*given)
        node.service.network = replace(MADE, mtu=1350)
        return made

    monkeypatch.setattr(commands, "add", slow_add)
    pod = namespaces.new()
    assert node.call("ADD", pod).exit == 0
    assert links_of(pod)["eth0"]["mtu"] == 1350
