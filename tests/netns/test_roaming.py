"""Two nodes, one of them behind a NAT: found by probes that prove themselves, and by no others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import Node, until
from tests.netns.pods import require_nft
from tests.netns.test_path_mtu import Network, network, plug  # noqa: F401 (a fixture)
from tests.netns.transfer import Transfer
from tests.netns_tools import run

pytestmark = pytest.mark.root

NAT = """
table ip nat {
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname "wire2" udp dport { 4789, 6081 } masquerade to :40000-49999
  }
}
"""
HIDDEN, PUBLIC = "192.0.1.1", "192.0.2.254"
"""The first node's address, and that of the router, which is all the second one sees of it."""


def start(network: Network, encapsulation: str, keys: tuple[str, str]) -> None:  # noqa: F811
    require_nft()
    run(network.router.command(["nft", "-f", "-"]), input=NAT)
    one, two = network.nodes
    two.namespace.ip("route", "del", "default")  # nothing leads to what is behind the router
    for node, other, pod, key in zip((one, two), (two, one), network.pods, keys, strict=True):
        node.tables["node"]["endpoints"] = [f"192.0.{node.number}.{node.number}"]
        other.tables["node"]["endpoints"] = [f"192.0.{other.number}.{other.number}"]
        node.tables["tunnel"] = {"encapsulation": encapsulation}
        key_file = write_key(node, key)
        node.tables["health"] = {"roaming": True, "key_file": str(key_file)}
        node.write_peers(other.record(features=["health", "roaming"]))
        node.start()
        plug(node, pod)


def write_key(node: Node, key: str) -> Path:
    path = node.directory / "key"
    path.write_text(key)
    path.chmod(0o600)
    return path


def peer(node: Node) -> dict[str, Any]:
    (answer,) = node.ask("peers")
    return dict(answer)


@pytest.mark.parametrize("encapsulation", ["geneve", pytest.param("vxlan", marks=pytest.mark.slow)])
def test_a_node_behind_a_nat_is_found(network: Network, encapsulation: str) -> None:  # noqa: F811
    start(network, encapsulation, ("of the same cluster", "of the same cluster"))
    one, two = network.nodes
    until(lambda: peer(two)["endpoint"] == PUBLIC, "the node behind the NAT", 5)
    found = peer(two)
    assert found["moved"]
    assert 40_000 <= found["port"] < 50_000
    assert found["endpoints"] == [HIDDEN]
    assert (peer(one)["endpoint"], peer(one)["moved"]) == ("192.0.2.2", False)
    until(lambda: peer(one)["health"]["state"] == peer(two)["health"]["state"] == "up", "health", 10)
    here, there = (pod.path for pod in network.pods)
    with Transfer(here, there, "10.42.2.10") as transfer:
        transfer.goes_on()
    assert sum(two.ask("drops")["decap"].values()) == two.ask("drops")["decap"]["unknown_peer"]


@pytest.mark.slow
def test_without_it_or_with_another_key_nobody_moves(network: Network) -> None:  # noqa: F811
    start(network, "geneve", ("of this cluster ....", "of another cluster .."))
    _, two = network.nodes
    # A hello each three seconds, of which each is heard and believed by nobody.
    until(lambda: two.ask("status")["counters"]["decap"]["probes"] >= 2, "hellos")
    time.sleep(0.3)  # Longer than a hello waits to be judged.
    assert (peer(two)["endpoint"], peer(two)["moved"]) == (HIDDEN, False)
    assert peer(two)["health"]["state"] != "up"


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (None, 0, "cannot be read"),
        ("too short", 0o600, "must be at least 16 bytes"),
        ("long enough to be a key", 0o644, "others may read it"),
    ],
)
def test_a_key_that_cannot_be_used(node: Node, text: str | None, mode: int, said: str) -> None:
    path = node.directory / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    node.tables["health"] = {"roaming": True, "key_file": str(path)}
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "health.key_file" in done.stderr
    assert said in done.stderr
