"""Probes through the pump: told to the control plane, never to a pod, and no packet by the counters."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.packets import build
from tests.pipeline.harness import (
    VNI,
    Node,
    Wire,
    gateway_mac,
    join,
    pod,
    router_mac,
    wait_readable,
    wire_address,
)

MakeNode = Callable[..., Node]

PROBE = b"pl\x01\x01" + bytes(range(1, 61))
ETHERTYPE = 0x88B5
RING = 512


def frame(probe: bytes = PROBE, *, destination: bytes = router_mac(1), ethertype: int = ETHERTYPE) -> bytes:
    return build.frame(probe, destination=destination, source=router_mac(2), ethertype=ethertype)


def datagram(encapsulation: str, inner: bytes, *, oam: bool = True, vni: int = VNI) -> bytes:
    return (build.geneve(vni, oam=oam) if encapsulation == "geneve" else build.vxlan(vni)) + inner


def probes(node: Node, direction: str) -> int:
    return node.pump.counters()[direction]["probes"]


def decap(node: Node, encapsulation: str, expected: int = 1) -> None:
    """Run decap until so many more datagrams came, probes or not."""

    def came() -> int:
        return node.received("decap") + probes(node, "decap")

    until = came() + expected
    while came() < until:
        wait_readable(node.receivers[encapsulation])
        node.pump.decap(node.receivers[encapsulation])


class TestSending:
    def test_what_is_on_the_wire(self, node: Node, wire: Wire, encapsulation: str) -> None:
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
        assert node.pump.send_probe(1, 0, PROBE)
        (sent,) = wire.get()
        inner = build.frame(PROBE, destination=router_mac(2), source=router_mac(1), ethertype=ETHERTYPE)
        assert sent.payload == datagram(encapsulation, inner)

    def test_padding_is_zeroes_whatever_pods_sent_before(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4), b"\xaa" * 1_200)))
        node.pump.encap()
        assert node.pump.send_probe(1, 0, PROBE, 1_450)
        _, sent = wire.get(2)
        assert sent.payload[8 + 14 :] == PROBE.ljust(1_450, b"\0")

    def test_a_flow_is_a_source_port(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        for flow in (0, 1, 2, 3, 4, 4_294_967_295):
            assert node.pump.send_probe(1, flow, PROBE)
        ports = [sent.source_port for sent in wire.get(6)]
        assert len(set(ports[:4])) == 4
        assert (ports[4], ports[5]) == (ports[0], ports[3])

    def test_no_packet_is_counted(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        node.pump.send_probe(1, 0, PROBE)
        assert probes(node, "encap") == 1
        assert (node.received("encap"), node.forwarded("encap"), node.dropped("encap")) == (0, 0, {})
        assert not any(node.peers.counters(1).values())

    def test_what_the_kernel_refuses_was_not_sent(self, make_node: MakeNode) -> None:
        node = make_node(1, 4)
        node.add_peer(1, 2, 9, address="127.255.255.255")  # EACCES
        node.add_peer(2, 3, 9, address="::1")  # no socket of the family
        assert not node.pump.send_probe(1, 0, PROBE)
        assert not node.pump.send_probe(2, 0, PROBE)
        node.add_peer(3, 4, 9)
        assert not node.pump.send_probe(3, 0, PROBE, 65_507 - 22 + 1)
        assert probes(node, "encap") == 0
        assert node.dropped("encap") == {}

    def test_traffic_goes_on_behind_it(self, node: Node, wire: Wire) -> None:
        """The two share the outbox's memory."""
        node.add_peer(1, 2, wire.port)
        for i in range(3):
            node.pump.send_probe(1, i, PROBE)
            for _ in range(3):
                node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4))))
            node.pump.encap()
        assert len(wire.get(12)) == 12
        assert (node.forwarded("encap"), probes(node, "encap")) == (9, 3)

    @pytest.mark.parametrize("slot", [0, 2, -1, 70_000])
    def test_a_slot_without_a_peer(self, node: Node, wire: Wire, slot: int) -> None:
        node.add_peer(1, 2, wire.port)
        with pytest.raises(KeyError, match="slot"):
            node.pump.send_probe(slot, 0, PROBE)

    @pytest.mark.parametrize(("probe", "length"), [(PROBE[:-1], 64), (PROBE + b"x", 65), (PROBE, 63)])
    def test_what_is_no_probe(self, node: Node, wire: Wire, probe: bytes, length: int) -> None:
        node.add_peer(1, 2, wire.port)
        with pytest.raises(ValueError, match=r"probe|packet_bytes"):
            node.pump.send_probe(1, 0, probe, length)


NO_PROBES = {
    "a packet": (frame(build.udp(pod(2, 4), pod(1, 4)), ethertype=0x0800), VNI),
    "another network": (frame(), VNI + 1),
    "another node's": (frame(destination=router_mac(9)), VNI),
    "a group's": (frame(destination=b"\xff" * 6), VNI),
    "another EtherType": (frame(ethertype=0x88B6), VNI),
    "another experiment": (frame(b"xx" + PROBE[2:]), VNI),
    "a version to come": (frame(b"pl\x02" + PROBE[3:]), VNI),
    "cut by a byte": (frame(PROBE[:-1]), VNI),
    "only its Ethernet header": (frame(b""), VNI),
    "cut in its Ethernet header": (frame(b"")[:13], VNI),
    "nothing": (b"", VNI),
}


class TestHearing:
    def test_it_goes_to_the_control_plane_and_to_no_pod(
        self, node: Node, wire: Wire, encapsulation: str
    ) -> None:
        node.add_peer(7, 2, wire.port, encapsulation=encapsulation)
        wire.send(datagram(encapsulation, frame()), node.address, node.port(encapsulation))
        decap(node, encapsulation)
        assert node.pump.take_probes() == [(7, PROBE)]
        assert node.pump.take_probes() == []
        assert node.pods_get() == []
        assert probes(node, "decap") == 1
        assert (node.received("decap"), node.forwarded("decap"), node.dropped("decap")) == (0, 0, {})
        assert not any(node.peers.counters(7).values())

    def test_padding_is_left_behind(self, node: Node, wire: Wire, encapsulation: str) -> None:
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
        padded = frame(PROBE.ljust(1_450, b"\xff"))
        wire.send(datagram(encapsulation, padded), node.address, node.port(encapsulation))
        decap(node, encapsulation)
        assert node.pump.take_probes() == [(1, PROBE)]

    def test_between_two_pumps(self, make_node: MakeNode, family: int, encapsulation: str) -> None:
        one, two = (make_node(number, family, gro=True) for number in (1, 2))
        join(one, two, encapsulation)
        sent = [PROBE[:4] + struct.pack("!I", i).ljust(60, b"\0") for i in range(40)]
        for i, probe in enumerate(sent):
            assert one.pump.send_probe(1, 0, probe, 64 if i % 4 else 1_450)
        decap(two, encapsulation, len(sent))
        assert two.pump.take_probes() == [(1, probe) for probe in sent]

    def test_with_options_that_may_be_ignored(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        header = build.geneve(VNI, oam=True, options=build.geneve_option(b"\0" * 8))
        wire.send(header + frame(), node.address, node.port("geneve"))
        decap(node, "geneve")
        assert node.pump.take_probes() == [(1, PROBE)]

    @pytest.mark.parametrize("name", NO_PROBES)
    def test_any_other_control_packet_is_dropped(self, node: Node, wire: Wire, name: str) -> None:
        inner, vni = NO_PROBES[name]
        node.add_peer(1, 2, wire.port)
        wire.send(datagram("geneve", inner, vni=vni), node.address, node.port("geneve"))
        self.is_dropped(node, "geneve", "tunnel_oam")

    def test_a_control_packet_that_is_no_ethernet_is_dropped(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        header = build.geneve(VNI, oam=True, protocol=0x0800)
        wire.send(header + frame(), node.address, node.port("geneve"))
        self.is_dropped(node, "geneve", "tunnel_oam")

    def test_in_geneve_without_the_control_bit_it_is_no_ip(self, node: Node, wire: Wire) -> None:
        node.add_peer(1, 2, wire.port)
        wire.send(datagram("geneve", frame(), oam=False), node.address, node.port("geneve"))
        self.is_dropped(node, "geneve", "frame_not_ip")

    @pytest.mark.parametrize(
        ("inner", "vni", "reason"),
        [
            (frame(), VNI + 1, "vni_unknown"),
            (frame(destination=router_mac(9)), VNI, "frame_not_for_router"),
            (frame(b"xx" + PROBE[2:]), VNI, "frame_not_ip"),
            (frame(PROBE[:-1]), VNI, "frame_not_ip"),
        ],
    )
    def test_what_is_no_probe_in_vxlan(
        self, node: Node, wire: Wire, inner: bytes, vni: int, reason: str
    ) -> None:
        node.add_peer(1, 2, wire.port, encapsulation="vxlan")
        wire.send(datagram("vxlan", inner, vni=vni), node.address, node.port("vxlan"))
        self.is_dropped(node, "vxlan", reason)

    def test_a_stranger_s_is_dropped(
        self, make_node: MakeNode, make_wire: Callable[[str], Wire], encapsulation: str
    ) -> None:
        node, stranger = make_node(1, 4), make_wire(wire_address(9, 4))
        stranger.send(datagram(encapsulation, frame()), node.address, node.port(encapsulation))
        self.is_dropped(node, encapsulation, "unknown_peer")

    def is_dropped(self, node: Node, encapsulation: str, reason: str) -> None:
        node.decap(encapsulation)
        assert node.dropped("decap") == {reason: 1}
        assert (node.pump.take_probes(), node.pods_get(), probes(node, "decap")) == ([], [], 0)
        node.assert_counters_close()

    def test_a_pod_cannot_send_one(self, node: Node, wire: Wire) -> None:
        """Neither to a peer nor to its own node: its frames go the way of packets."""
        node.add_peer(1, 2, wire.port)
        node.pods_send(
            build.frame(PROBE, destination=router_mac(1), source=gateway_mac(1), ethertype=ETHERTYPE)
        )
        node.pump.encap()
        assert node.dropped("encap") == {"frame_not_ip": 1}
        assert (node.pump.take_probes(), wire.get_now()) == ([], [])


def test_more_than_there_is_room_for_are_dropped_and_counted(
    make_node: MakeNode, make_wire: Callable[[str], Wire], encapsulation: str
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    sent = [PROBE[:4] + struct.pack("!I", i).ljust(60, b"\0") for i in range(RING + 10)]
    for probe in sent:
        wire.send(datagram(encapsulation, frame(probe)), node.address, node.port(encapsulation))
        decap(node, encapsulation)
    assert node.dropped("decap") == {"probes_full": 10}
    assert (node.received("decap"), probes(node, "decap")) == (10, RING)
    node.assert_counters_close()
    assert node.pump.take_probes() == [(1, probe) for probe in sent[:RING]]
    wire.send(datagram(encapsulation, frame()), node.address, node.port(encapsulation))
    decap(node, encapsulation)
    assert node.pump.take_probes() == [(1, PROBE)], "there is room again"
