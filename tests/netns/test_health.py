"""Two real daemons and what each says of the path to the other, while a test cuts it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.netns.nodes import Node, until
from tests.netns.pods import UNDERLAY, require_nft
from tests.netns_tools import run

pytestmark = pytest.mark.root

Pair = tuple[Node, Node]

PROMISED_SECONDS = 10.0
DEAD_INPUT = """
table inet cut {
  chain input {
    type filter hook input priority 0;
    udp dport { 4789, 6081 } drop
  }
}
"""


@contextmanager
def deaf(node: Node) -> Iterator[None]:
    """Nothing of the tunnel gets in; what the node sends still leaves it."""
    run(node.namespace.command(["nft", "-f", "-"]), input=DEAD_INPUT)
    yield
    run(node.namespace.command(["nft", "delete", "table", "inet", "cut"]))


def start(pair: Pair, underlay: int, encapsulation: str, **record: Any) -> None:
    for node, other in (pair, pair[::-1]):
        node.tables["node"]["endpoints"] = [UNDERLAY[underlay].format(node.number)]
        other.tables["node"]["endpoints"] = [UNDERLAY[underlay].format(other.number)]
        node.tables["tunnel"] = {"encapsulation": encapsulation}
        node.write_peers(other.record(**record))
    for node in pair:
        node.start()


def health(node: Node) -> dict[str, Any]:
    (peer,) = node.ask("peers")
    answer: dict[str, Any] = peer["health"]
    return answer


def states(pair: Pair) -> list[str]:
    return [health(node)["state"] for node in pair]


@pytest.mark.parametrize(
    ("cut", "underlay", "encapsulation"),
    [
        pytest.param(1, 4, "geneve", id="n1 to n2, Geneve over IPv4"),
        pytest.param(0, 6, "vxlan", id="n2 to n1, VXLAN over IPv6", marks=pytest.mark.slow),
    ],
)
def test_a_half_dead_path_is_down_on_both_sides_and_heals(
    pair: Pair, cut: int, underlay: int, encapsulation: str
) -> None:
    require_nft()
    start(pair, underlay, encapsulation, features=["health"])
    until(lambda: states(pair) == ["up", "up"], "up on both sides")
    until(lambda: all(health(node)["encap_loss"] == 0 for node in pair), "each other's word")
    for node in pair:
        seen = health(node)
        assert seen["decap_loss"] == 0
        assert 0 < seen["rtt_seconds"] < 0.5
    with deaf(pair[cut]):
        begun = time.monotonic()
        until(lambda: states(pair) == ["down", "down"], "down on both sides", PROMISED_SECONDS)
        assert time.monotonic() - begun > 1.0
        assert health(pair[cut])["fault"] == "nothing is heard of it"
        assert health(pair[1 - cut])["fault"] == "it does not hear us"
        assert "down" in pair[cut].run("peers").stdout
    until(lambda: states(pair) == ["up", "up"], "up again", PROMISED_SECONDS)
    for node in pair:
        until(lambda node=node: node.log.count(": up: ") == 2, "its news in the log")
        assert node.log.count(": down, ") == 1
        # No probe was taken for a packet, and none came to a pod.
        counters, drops = node.ask("status")["counters"], node.ask("drops")
        for direction in ("encap", "decap"):
            assert counters[direction]["probes"] > 5
            assert counters[direction]["received"] == counters[direction]["forwarded"] + sum(
                drops[direction].values()
            )
        assert drops["decap"]["tunnel_oam"] == drops["decap"]["frame_not_ip"] == 0


def test_a_peer_that_did_not_agree_is_not_probed(pair: Pair) -> None:
    """Nor does a node that is told not to send any."""
    one, two = pair
    two.tables["health"] = {"enabled": False}
    start(pair, 4, "geneve")
    two.write_peers(one.record(features=["health"]))
    time.sleep(1.5)  # More than an interval, in which nothing may happen.
    assert states(pair) == ["not probed", "not probed"]
    for node in pair:
        assert {counted["probes"] for counted in node.ask("status")["counters"].values()} == {0}
    assert "not probed" in one.run("peers").stdout
