"""What lies outside the cluster sees the node's address, and pods see each other's."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.netns.nodes import Node
from tests.netns.pods import UNDERLAY, VERSIONS, plug, require_nft, source_seen, tables
from tests.netns_tools import Namespace, run

pytestmark = pytest.mark.root

Pair = tuple[Node, Node]


@pytest.fixture(autouse=True)
def nft(root: None) -> None:
    require_nft()


def start(pair: Pair) -> None:
    """Both nodes, as each other's peers."""
    one, two = pair
    one.write_peers(two.record())
    two.write_peers(one.record())
    for node in pair:
        node.start()


@VERSIONS
def test_a_server_outside_sees_the_nodes_address(
    pair: Pair, netns: Callable[[], Namespace], version: int
) -> None:
    start(pair)
    one, two = pair
    pod = netns()
    plug(one, pod)
    server = UNDERLAY[version].format(2)
    assert source_seen(two.namespace, server, pod) == UNDERLAY[version].format(1)
    assert two.ask("drops")["encap"]["inner_source"] == 0


@VERSIONS
def test_pods_see_each_others_addresses(pair: Pair, netns: Callable[[], Namespace], version: int) -> None:
    start(pair)
    one, two = pair
    pods = netns(), netns(), netns()
    client, neighbour, distant = [plug(node, pod) for node, pod in zip((one, one, two), pods, strict=True)]
    assert source_seen(pods[1], neighbour[version], pods[0]) == client[version]
    assert source_seen(pods[2], distant[version], pods[0]) == client[version]


@VERSIONS
def test_a_host_sees_its_own_pods_addresses(pair: Pair, netns: Callable[[], Namespace], version: int) -> None:
    one, _ = pair
    one.start()
    pod = netns()
    own = plug(one, pod)
    assert source_seen(one.namespace, UNDERLAY[version].format(1), pod) == own[version]


@VERSIONS
def test_off_leaves_pods_their_addresses(pair: Pair, netns: Callable[[], Namespace], version: int) -> None:
    """The other node's answer then goes towards the tunnel, from an address that is no pod's."""
    one, two = pair
    one.tables["node"]["ip_masquerade"] = False
    start(pair)
    pod = netns()
    plug(one, pod)
    assert tables(one) == ""
    with pytest.raises(TimeoutError):
        source_seen(two.namespace, UNDERLAY[version].format(2), pod, seconds=1.0)
    assert two.ask("drops")["encap"]["inner_source"] > 0


def test_the_table_is_there_once_after_restarts_and_goes_when_switched_off(node: Node) -> None:
    node.start()
    first = tables(node)
    assert first.count("table inet podloom-loom0 {") == 1
    assert first.count("masquerade") == 2
    assert node.stop() == 0
    assert tables(node) == first, "pods keep it over a restart"
    node.start()
    assert tables(node) == first
    assert node.stop(signal.SIGKILL) == -signal.SIGKILL
    node.tables["node"]["ip_masquerade"] = False
    node.start()
    assert tables(node) == ""


def test_others_tables_are_left_alone(node: Node) -> None:
    theirs = "table inet podloom {\n}\n"
    run(node.namespace.command(["nft", "-f", "-"]), input=theirs)
    node.tables["links"] = {"keep_on_exit": False}
    node.start()
    assert "table inet podloom-loom0 {" in tables(node)
    assert node.stop() == 0
    assert tables(node) == theirs


def test_the_table_goes_with_the_links(node: Node) -> None:
    node.tables["links"] = {"keep_on_exit": False}
    node.start()
    assert tables(node)
    assert node.stop() == 0
    assert tables(node) == ""
