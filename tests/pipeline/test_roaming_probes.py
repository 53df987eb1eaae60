"""Roaming probes through the pump: from anybody, if that is wanted; and peers that are sent to from home."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from fastpath.drops import DropReason
from tests.packets import build
from tests.pipeline.harness import VNI, Node, Wire, pod, router_mac, wait_readable, wire_address
from tests.pipeline.test_probes import datagram, frame, probes

HELLO = b"pl\x01\x10" + bytes(range(60))
REPORT = b"pl\x01\x01" + bytes(range(60))


def arrive(node: Node, wire: Wire, encapsulation: str, payload: bytes) -> None:
    wire.send(payload, node.address, node.port(encapsulation))
    wait_readable(node.receivers[encapsulation])
    assert node.pump.decap(node.receivers[encapsulation]) == 1


def packed(node: Node) -> bytes:
    """The address of node 2's place on the wire."""
    family = socket.AF_INET if node.family == 4 else socket.AF_INET6
    return socket.inet_pton(family, wire_address(2, node.family))


def test_a_strangers_is_an_unknown_peers_unless_it_is_wanted(
    node: Node, wire: Wire, encapsulation: str
) -> None:
    arrive(node, wire, encapsulation, datagram(encapsulation, frame(HELLO)))
    assert node.dropped("decap") == {"unknown_peer": 1}
    node.pump.hear_roaming(True)
    arrive(node, wire, encapsulation, datagram(encapsulation, frame(HELLO)))
    assert node.pump.take_roaming_probes() == [(-1, encapsulation, packed(node), wire.port, HELLO)]
    assert node.pump.take_roaming_probes() == []
    assert (node.dropped("decap"), node.received("decap")) == ({"unknown_peer": 1}, 1)
    assert (probes(node, "decap"), node.pump.take_probes(), node.pods_get()) == (1, [], [])


def test_a_peers_comes_with_its_slot_and_port(node: Node, wire: Wire, encapsulation: str) -> None:
    node.add_peer(5, 2, 9, encapsulation=encapsulation)
    node.pump.hear_roaming(True)
    arrive(node, wire, encapsulation, datagram(encapsulation, frame(HELLO)))
    assert node.pump.take_roaming_probes() == [(5, encapsulation, packed(node), wire.port, HELLO)]
    assert node.pump.take_probes() == []


def test_a_peers_that_is_not_wanted(node: Node, wire: Wire, encapsulation: str) -> None:
    node.add_peer(5, 2, 9, encapsulation=encapsulation)
    arrive(node, wire, encapsulation, datagram(encapsulation, frame(HELLO)))
    assert node.dropped("decap") == {"probes_full": 1}
    assert node.pump.take_roaming_probes() == []


NOT_HEARD: dict[str, Callable[[str], bytes]] = {
    "a report": lambda kind: datagram(kind, frame(REPORT)),
    "another network's": lambda kind: datagram(kind, frame(HELLO), vni=VNI + 1),
    "another node's": lambda kind: datagram(kind, frame(HELLO, destination=router_mac(9))),
    "a version to come": lambda kind: datagram(kind, frame(b"pl\x02" + HELLO[3:])),
    "cut": lambda kind: datagram(kind, frame(HELLO[:-1])),
    "cut in its Ethernet header": lambda kind: datagram(kind, frame(HELLO)[:13]),
    "no frame": lambda kind: datagram(kind, b""),
    "no header": lambda kind: datagram(kind, b"")[:7],
    "nothing": lambda _: b"",
    "a packet": lambda kind: datagram(
        kind, frame(build.udp(pod(2, 4), pod(1, 4)), ethertype=0x800), oam=False
    ),
}


@pytest.mark.parametrize("name", NOT_HEARD)
def test_of_a_stranger_nothing_else_is_heard(node: Node, wire: Wire, encapsulation: str, name: str) -> None:
    node.pump.hear_roaming(True)
    arrive(node, wire, encapsulation, NOT_HEARD[name](encapsulation))
    assert node.dropped("decap") == {"unknown_peer": 1}
    assert (node.pump.take_roaming_probes(), node.pump.take_probes()) == ([], [])


def test_strangers_fill_a_ring_of_their_own(node: Node, wire: Wire) -> None:
    node.pump.hear_roaming(True)
    for _ in range(64 + 6):
        arrive(node, wire, "geneve", datagram("geneve", frame(HELLO)))
    node.add_peer(1, 2, wire.port)
    arrive(node, wire, "geneve", datagram("geneve", frame(REPORT)))
    assert node.pump.take_probes() == [(1, REPORT)]
    assert node.dropped("decap") == {DropReason.UNKNOWN_PEER.name.lower(): 6}
    assert len(node.pump.take_roaming_probes()) == 64
    node.assert_counters_close()


def test_all_goes_out_from_home(node: Node, wire: Wire, encapsulation: str) -> None:
    """Packets of many flows and probes leave from the port that the peer's would come to."""
    node.peers.set(
        1,
        encapsulation=encapsulation,
        vni=VNI,
        router_mac=router_mac(2),
        endpoint=packed(node),
        port=wire.port,
        mtu=1_450,
        from_home=True,
    )
    node.insert("10.2.0.0/24", 1)
    for sport in range(20):
        node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4), sport=40_000 + sport)))
    node.pump.encap()
    for flow in range(4):
        assert node.pump.send_probe(1, flow, REPORT)
    assert {sent.source_port for sent in wire.get(24)} == {node.port(encapsulation)}
