"""A frame that goes in on one node comes out on the other, over every combination of what may carry it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from threading import Thread

import pytest

from fastpath.drops import DropReason
from fastpath.pump import Pump
from fastpath.table import PeerTable, PrefixTable
from tests.packets import build
from tests.pipeline.harness import (
    DEADLINE_SECONDS,
    POD_MTU,
    VNI,
    Node,
    Wire,
    gateway_mac,
    join,
    pod,
    router_mac,
    wait_readable,
)
from tests.reference import ecn as ecn_oracle
from tests.reference import journeys
from tests.reference.checksum import ipv4_header_is_valid, transport_is_valid

MakeNode = Callable[..., Node]
MakeWire = Callable[[str], Wire]


@pytest.fixture
def two(make_node: MakeNode, family: int, encapsulation: str) -> tuple[Node, Node]:
    """Nodes 1 and 2, peers of each other."""
    one, other = make_node(1, family), make_node(2, family)
    join(one, other, encapsulation)
    return one, other


def delivered(packet: bytes, node: int) -> bytes:
    """The frame in which node `node` hands a packet to its pods."""
    return build.frame(packet, destination=gateway_mac(node), source=router_mac(node))


class TestAcross:
    """Two pumps, joined."""

    def test_a_frame_crosses_and_only_its_macs_change(
        self, two: tuple[Node, Node], encapsulation: str, inner: int
    ) -> None:
        one, other = two
        packet = build.udp(pod(1, inner), pod(2, inner), b"hello")
        one.pods_send(one.frame(packet))
        assert one.pump.encap() == 1
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]
        assert one.dropped("encap") == other.dropped("decap") == {}

    def test_and_back(self, two: tuple[Node, Node], encapsulation: str, inner: int) -> None:
        one, other = two
        packet = build.tcp(pod(2, inner), pod(1, inner), b"hello")
        other.pods_send(other.frame(packet))
        other.pump.encap()
        one.decap(encapsulation)
        assert one.pods_get() == [delivered(packet, 1)]

    @pytest.mark.parametrize("length", [1, 8, 18, 46])
    def test_ethernet_padding_is_left_behind(
        self, two: tuple[Node, Node], encapsulation: str, inner: int, length: int
    ) -> None:
        one, other = two
        packet = build.udp(pod(1, inner), pod(2, inner), b"")
        one.pods_send(one.frame(packet, padding=b"\xaa" * length))
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    @pytest.mark.parametrize("make", [build.udp, build.tcp], ids=["UDP", "TCP"])
    @pytest.mark.parametrize("padding", [b"", b"\xaa" * 7], ids=["unpadded", "padded"])
    def test_a_partial_checksum_is_completed(
        self, two: tuple[Node, Node], encapsulation: str, inner: int, make: object, padding: bytes
    ) -> None:
        one, other = two
        packet = (build.udp if make is build.udp else build.tcp)(pod(1, inner), pod(2, inner), b"odd")
        partial, start, offset = build.leave_checksum_partial(packet)
        virtio = one.virtio(flags=build.NEEDS_CHECKSUM, checksum_start=14 + start, checksum_offset=offset)
        one.pods_send(one.frame(partial, padding=padding), virtio)
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]
        assert transport_is_valid(packet)

    @pytest.mark.parametrize("field", ecn_oracle.NAMES, ids=ecn_oracle.NAMES.values())
    def test_ecn_and_dscp_survive(
        self, two: tuple[Node, Node], encapsulation: str, inner: int, field: int
    ) -> None:
        one, other = two
        packet = build.udp(pod(1, inner), pod(2, inner), tos=0x2E << 2 | field)
        one.pods_send(one.frame(packet))
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    def test_fragments_cross_in_order(self, two: tuple[Node, Node], encapsulation: str, inner: int) -> None:
        one, other = two
        pieces = build.fragments(pod(1, inner), pod(2, inner), payload_length=9_000)
        for piece in pieces:
            one.pods_send(one.frame(piece))
        assert one.pump.encap() == len(pieces)
        other.decap(encapsulation, len(pieces))
        assert other.pods_get() == [delivered(piece, 2) for piece in pieces]

    def test_other_protocols_cross(self, two: tuple[Node, Node], encapsulation: str, inner: int) -> None:
        one, other = two
        packet = build.ping(pod(1, inner), pod(2, inner))
        one.pods_send(one.frame(packet))
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    @pytest.mark.parametrize(
        "lengths",
        [
            pytest.param([1_390] * 100, id="one size: runs at their caps"),
            pytest.param([1_390] * 43 + [3] + [1_390] * 10 + [700] * 5, id="tails and sizes that change"),
            pytest.param(list(range(300)), id="each longer than the last"),
            pytest.param(list(range(300, 0, -1)), id="each shorter than the last"),
            pytest.param([0] * 200, id="many and small"),
        ],
    )
    def test_one_flow_crosses_whole_and_in_order(
        self, two: tuple[Node, Node], encapsulation: str, inner: int, lengths: list[int]
    ) -> None:
        one, other = two
        template = build.tcp(pod(1, inner), pod(2, inner), b"")
        packets = [
            build.tcp(pod(1, inner), pod(2, inner), bytes(length), sequence=at) if at < 3 else template
            for at, length in enumerate(lengths[:3])
        ]
        packets += [_lengthened(template, length, at) for at, length in enumerate(lengths[3:], 3)]
        _carry(one, other, encapsulation, packets)
        assert other.pods_get() == [delivered(packet, 2) for packet in packets]
        assert one.forwarded("encap") == other.forwarded("decap") == len(packets)

    def test_more_frames_in_one_call_than_any_batch_holds(
        self, make_node: MakeNode, encapsulation: str, inner: int
    ) -> None:
        frames = 1_500
        one, other = make_node(1, 4, senders=1), make_node(2, 4)
        join(one, other, encapsulation)
        one.pump_tap.setblocking(True)  # then one call waits for all its frames, however few the pair holds
        one.tap.setblocking(True)
        template = build.udp(pod(1, inner), pod(2, inner), b"...")
        packets = [template[:-2] + at.to_bytes(2, "big") for at in range(frames)]
        reader = Thread(target=one.pump.encap, args=(frames,))
        reader.start()
        for packet in packets:
            one.pods_send(one.frame(packet))
        reader.join(DEADLINE_SECONDS)
        got: list[bytes] = []
        while len(got) < frames:
            wait_readable(other.receivers[encapsulation])
            other.pump.decap(other.receivers[encapsulation], 1)
            got += other.pods_get()
        assert got == [delivered(packet, 2) for packet in packets]
        assert one.forwarded("encap") == frames

    def test_flows_to_many_pods_mixed(self, two: tuple[Node, Node], encapsulation: str) -> None:
        one, other = two
        packets = [
            build.udp(
                pod(1, 4 + at % 2 * 2, 1 + at % 5), pod(2, 4 + at % 2 * 2, 1 + at % 7), bytes(at), tos=at % 3
            )
            for at in range(200)
        ]
        _carry(one, other, encapsulation, packets)
        # Order holds within a flow; flows leave by their own sockets.
        assert sorted(other.pods_get()) == sorted(delivered(packet, 2) for packet in packets)

    def test_the_largest_packet_a_datagram_can_hold(
        self, make_node: MakeNode, family: int, encapsulation: str, inner: int
    ) -> None:
        one, other = make_node(1, family), make_node(2, family)
        join(one, other, encapsulation, mtu=65_535)
        # Over IPv6 it is loopback's MTU of 65,536 that binds: the outer packet is never fragmented.
        largest = (65_507 if family == 4 else 65_536 - 40 - 8) - 8 - 14
        packet = _lengthened(
            build.tcp(pod(1, inner), pod(2, inner), b""), largest - (40 if inner == 4 else 60), 7
        )
        assert len(packet) == largest
        one.pods_send(one.frame(packet))
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    def test_a_packet_of_exactly_the_peers_mtu(
        self, two: tuple[Node, Node], encapsulation: str, inner: int
    ) -> None:
        one, other = two
        headers = 28 if inner == 4 else 48
        packet = build.udp(pod(1, inner), pod(2, inner), bytes(POD_MTU - headers))
        one.pods_send(one.frame(packet))
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    @pytest.mark.parametrize("vnet_header_size", [10, 12, 24])
    def test_each_size_of_virtio_header(
        self, make_node: MakeNode, family: int, encapsulation: str, inner: int, vnet_header_size: int
    ) -> None:
        one, other = (make_node(number, family, vnet_header_size=vnet_header_size) for number in (1, 2))
        join(one, other, encapsulation)
        packet = build.tcp(pod(1, inner), pod(2, inner))
        partial, start, offset = build.leave_checksum_partial(packet)
        virtio = one.virtio(flags=build.NEEDS_CHECKSUM, checksum_start=14 + start, checksum_offset=offset)
        one.pods_send(one.frame(partial), virtio)
        one.pump.encap()
        other.decap(encapsulation)
        assert other.pods_get() == [delivered(packet, 2)]

    def test_counters_of_pump_and_peer(self, two: tuple[Node, Node], encapsulation: str, inner: int) -> None:
        one, other = two
        packets = [build.udp(pod(1, inner), pod(2, inner), bytes(at)) for at in range(20)]
        _carry(one, other, encapsulation, packets)
        total = sum(map(len, packets))
        none = {"encap_packets": 0, "encap_bytes": 0, "decap_packets": 0, "decap_bytes": 0}
        assert one.peers.counters(1) == none | {"encap_packets": 20, "encap_bytes": total}
        assert other.peers.counters(1) == none | {"decap_packets": 20, "decap_bytes": total}
        for node, direction in ((one, "encap"), (other, "decap")):
            counters = node.pump.counters()[direction]
            assert (counters["received"], counters["forwarded"], counters["forwarded_bytes"]) == (
                20,
                20,
                total,
            )
            assert node.pump.moved_bytes == total

    def test_a_refused_segmentation_loses_and_doubles_nothing(
        self, make_node: MakeNode, encapsulation: str, inner: int
    ) -> None:
        """A socket that sends no checksum refuses UDP_SEGMENT, as a route without offload does."""
        one, other = make_node(1, 4, senders=1), make_node(2, 4)
        join(one, other, encapsulation)
        with socket.socket(fileno=os.dup(one.sockets[-1])) as sender:
            sender.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
        template = build.udp(pod(1, inner), pod(2, inner), bytes(1_000))
        packets = [template[:-2] + at.to_bytes(2, "big") for at in range(100)]
        _carry(one, other, encapsulation, packets)
        assert other.pods_get() == [delivered(packet, 2) for packet in packets]
        assert one.dropped("encap") == {}
        one.assert_counters_close()


def _lengthened(packet: bytes, length: int, mark: int) -> bytes:
    """A packet with `length` more bytes, its IP length told so; quicker than building one in scapy."""
    payload = (mark.to_bytes(4, "big") * (length // 4 + 1))[:length]
    if packet[0] >> 4 == 4:
        return packet[:2] + (len(packet) + length).to_bytes(2, "big") + packet[4:] + payload
    return packet[:4] + (len(packet) - 40 + length).to_bytes(2, "big") + packet[6:] + payload


def _carry(one: Node, other: Node, encapsulation: str, packets: list[bytes]) -> None:
    for start in range(0, len(packets), 100):
        batch = packets[start : start + 100]
        for packet in batch:
            one.pods_send(one.frame(packet))
        assert one.pump.encap() == len(batch)
        other.decap(encapsulation, len(batch))


class TestEncap:
    """One pump; the far end is a plain socket that shows what is on the wire."""

    @pytest.fixture(autouse=True)
    def _peer(self, node: Node, wire: Wire, encapsulation: str) -> None:
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation)

    def test_the_datagram_byte_for_byte(self, node: Node, wire: Wire, encapsulation: str, inner: int) -> None:
        packet = build.udp(pod(1, inner), pod(2, inner))
        node.pods_send(node.frame(packet, padding=bytes(9)))
        node.pump.encap()
        (datagram,) = wire.get()
        header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
        assert datagram.payload == header + build.frame(
            packet, destination=router_mac(2), source=router_mac(1)
        )

    def test_the_vni_on_the_wire_is_the_peers(
        self, node: Node, wire: Wire, encapsulation: str, inner: int
    ) -> None:
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation, vni=0xFFFFFF)
        node.pods_send(node.frame(build.udp(pod(1, inner), pod(2, inner))))
        node.pump.encap()
        (datagram,) = wire.get()
        assert datagram.payload[4:8] == b"\xff\xff\xff\0"

    @pytest.mark.parametrize("field", ecn_oracle.NAMES, ids=ecn_oracle.NAMES.values())
    def test_the_outer_header_has_the_inner_ecn_and_no_dscp(
        self, node: Node, wire: Wire, inner: int, field: int
    ) -> None:
        node.pods_send(node.frame(build.udp(pod(1, inner), pod(2, inner), tos=0x2E << 2 | field)))
        node.pump.encap()
        (datagram,) = wire.get()
        assert datagram.tos == field

    def test_ecn_is_each_datagrams_own_within_one_batch(self, node: Node, wire: Wire, inner: int) -> None:
        fields = [0, 0, 2, 2, 3, 0, 1, 2, 3, 3]
        for field in fields:
            node.pods_send(node.frame(build.udp(pod(1, inner), pod(2, inner), tos=field)))
        node.pump.encap()
        got = wire.get(len(fields))
        assert [datagram.tos for datagram in got] == fields

    @pytest.mark.parametrize("make", [build.udp, build.tcp], ids=["UDP", "TCP"])
    def test_a_flow_keeps_its_source_port(self, node: Node, wire: Wire, inner: int, make: object) -> None:
        transport = build.udp if make is build.udp else build.tcp
        ports = set()
        for at in range(20):
            node.pods_send(node.frame(transport(pod(1, inner), pod(2, inner), bytes(at * 7), tos=at % 4)))
            node.pump.encap()
            ports |= {datagram.source_port for datagram in wire.get()}
        assert len(ports) == 1

    def test_fragments_of_one_datagram_share_a_source_port(self, node: Node, wire: Wire, inner: int) -> None:
        for _ in range(4):
            pieces = build.fragments(pod(1, inner), pod(2, inner), payload_length=4_500)
            for piece in pieces:
                node.pods_send(node.frame(piece))
            node.pump.encap()
            assert len({datagram.source_port for datagram in wire.get(len(pieces))}) == 1

    def test_many_flows_spread_over_the_source_ports(self, node: Node, wire: Wire, inner: int) -> None:
        flows = 400
        template = build.udp(pod(1, inner), pod(2, inner), b"")
        at = 20 if inner == 4 else 40
        for start in range(0, flows, 100):
            for port in range(start, start + 100):
                node.pods_send(
                    node.frame(template[:at] + (10_000 + port).to_bytes(2, "big") + template[at + 2 :])
                )
            node.pump.encap()
        ports = [datagram.source_port for datagram in wire.get(flows)]
        used = set(ports)
        assert len(used) == node.senders
        for port in used:  # 100 expected; 8.7 is one sigma
            assert 50 < ports.count(port) < 150

    def test_the_budget_bounds_what_is_read(self, node: Node, wire: Wire, inner: int) -> None:
        for _ in range(10):
            node.pods_send(node.frame(build.udp(pod(1, inner), pod(2, inner))))
        assert [node.pump.encap(4) for _ in range(4)] == [4, 4, 2, 0]
        assert len(wire.get(10)) == 10

    def test_nothing_to_read(self, node: Node) -> None:
        assert node.pump.encap() == 0
        assert node.received("encap") == 0

    def test_a_dropped_frame_does_not_hold_up_its_neighbours(
        self, node: Node, wire: Wire, inner: int
    ) -> None:
        good = node.frame(build.udp(pod(1, inner), pod(2, inner)))
        for frame in (good, b"short", good, bytes(60), good):
            node.pods_send(frame)
        assert node.pump.encap() == 5
        assert len(wire.get(3)) == 3
        assert node.forwarded("encap") == 3
        node.assert_counters_close()


class TestDecap:
    """One pump; datagrams are written by hand."""

    @pytest.fixture(autouse=True)
    def _peer(self, node: Node, wire: Wire, encapsulation: str) -> None:
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation)

    def inject(self, node: Node, wire: Wire, encapsulation: str, packet: bytes, **options: object) -> None:
        header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
        frame = build.frame(packet, destination=router_mac(1), source=router_mac(2), padding=b"")
        tos = options.get("tos", 0)
        assert isinstance(tos, int)
        wire.send(header + frame, node.address, node.port(encapsulation), tos)
        node.decap(encapsulation)

    @pytest.mark.parametrize(
        ("inside", "outside"), ecn_oracle.DECAPSULATED, ids=lambda field: ecn_oracle.NAMES[field]
    )
    def test_every_cell_of_rfc_6040(
        self, node: Node, wire: Wire, encapsulation: str, inner: int, inside: int, outside: int
    ) -> None:
        dscp = 0x2E << 2
        packet = build.udp(pod(2, inner), pod(1, inner), tos=dscp | inside)
        self.inject(node, wire, encapsulation, packet, tos=outside)
        expected = ecn_oracle.DECAPSULATED[inside, outside]
        if expected is None:
            assert node.pods_get() == []
            assert node.dropped("decap") == {"ecn_ce_not_ect": 1}
            return
        (frame,) = node.pods_get()
        assert frame == delivered(build.udp(pod(2, inner), pod(1, inner), tos=dscp | expected), 1)
        assert inner == 6 or ipv4_header_is_valid(frame[14:])
        assert transport_is_valid(frame[14:])

    def test_the_outer_dscp_stays_outside(
        self, node: Node, wire: Wire, encapsulation: str, inner: int
    ) -> None:
        packet = build.udp(pod(2, inner), pod(1, inner), tos=0)
        self.inject(node, wire, encapsulation, packet, tos=0xB8)
        assert node.pods_get() == [delivered(packet, 1)]

    def test_a_wrong_ipv4_header_checksum_is_not_laundered(
        self, node: Node, wire: Wire, encapsulation: str
    ) -> None:
        packet = bytearray(build.udp(pod(2, 4), pod(1, 4), tos=2))
        packet[10] ^= 0x5A
        self.inject(node, wire, encapsulation, bytes(packet), tos=3)
        for frame in node.pods_get():  # dropping it is as good
            assert not ipv4_header_is_valid(frame[14:])

    def test_a_bad_inner_checksum_is_passed_on_as_bad(
        self, node: Node, wire: Wire, encapsulation: str, inner: int
    ) -> None:
        packet = build.udp(pod(2, inner), pod(1, inner), b"payload")[:-1] + b"X"
        self.inject(node, wire, encapsulation, packet)
        assert node.pods_get() == [delivered(packet, 1)]

    def test_padding_behind_the_packet_is_left_behind(
        self, node: Node, wire: Wire, encapsulation: str, inner: int
    ) -> None:
        packet = build.udp(pod(2, inner), pod(1, inner), b"")
        header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
        frame = build.frame(packet, destination=router_mac(1), source=router_mac(2), padding=b"\xaa" * 11)
        wire.send(header + frame, node.address, node.port(encapsulation))
        node.decap(encapsulation)
        assert node.pods_get() == [delivered(packet, 1)]

    def test_the_budget_bounds_what_is_received(
        self, node: Node, wire: Wire, encapsulation: str, inner: int
    ) -> None:
        packet = build.udp(pod(2, inner), pod(1, inner))
        header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
        datagram = header + build.frame(packet, destination=router_mac(1), source=router_mac(2))
        for _ in range(5):
            wire.send(datagram, node.address, node.port(encapsulation))
        fd = node.receivers[encapsulation]
        assert [node.pump.decap(fd, 2) for _ in range(4)] == [2, 2, 1, 0]
        assert len(node.pods_get()) == 5

    def test_a_train_is_taken_apart(self, node: Node, wire: Wire, encapsulation: str, inner: int) -> None:
        """UDP_GRO hands over a train of equal datagrams in one message: each is judged by itself."""
        header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
        foreign = build.geneve(VNI + 1) if encapsulation == "geneve" else build.vxlan(VNI + 1)
        packets = [build.udp(pod(2, inner), pod(1, inner), bytes([at]) * 100) for at in range(20)]
        train = b"".join(
            (foreign if at % 5 == 2 else header)
            + build.frame(packet, destination=router_mac(1), source=router_mac(2))
            for at, packet in enumerate(packets)
        )
        tail = (header + build.frame(packets[0], destination=router_mac(1), source=router_mac(2)))[:50]
        size = (len(train)) // len(packets)
        segment = [(socket.IPPROTO_UDP, 103, size.to_bytes(2, "little"))]  # UDP_SEGMENT
        wire.socket.sendmsg([train, tail], segment, 0, (node.address, node.port(encapsulation)))
        node.decap(encapsulation, 21)
        assert node.pods_get() == [delivered(packet, 1) for at, packet in enumerate(packets) if at % 5 != 2]
        assert node.dropped("decap") == {"vni_unknown": 4, "ip_malformed": 1}
        assert node.received("decap") == 21
        node.assert_counters_close()


def test_both_encapsulations_are_heard_at_once(make_node: MakeNode, make_wire: MakeWire) -> None:
    """A peer may change its encapsulation without this node knowing."""
    node, wire = make_node(1, 4), make_wire("127.0.71.2")
    node.add_peer(1, 2, wire.port, encapsulation="geneve")
    packet = build.udp(pod(2, 4), pod(1, 4))
    frame = build.frame(packet, destination=router_mac(1), source=router_mac(2))
    wire.send(build.geneve(VNI) + frame, node.address, node.port("geneve"))
    wire.send(build.vxlan(VNI) + frame, node.address, node.port("vxlan"))
    node.decap("geneve")
    node.decap("vxlan")
    assert node.pods_get() == [delivered(packet, 1)] * 2


def test_a_peer_moves_to_another_encapsulation_endpoint_and_back(
    make_node: MakeNode, make_wire: MakeWire
) -> None:
    node, old, new = make_node(1, 4), make_wire("127.0.71.2"), make_wire("127.0.71.3")
    frame = node.frame(build.udp(pod(1, 4), pod(2, 4)))
    seen = []
    for wire, encapsulation, address in (
        (old, "geneve", None),
        (new, "vxlan", "127.0.71.3"),
        (old, "geneve", "127.0.71.2"),
    ):
        node.add_peer(1, 2, wire.port, encapsulation=encapsulation, address=address)
        node.pods_send(frame)
        node.pump.encap()
        seen += [datagram.payload[0] for datagram in wire.get()]
    assert seen == [0x00, 0x08, 0x00]
    assert node.peers.counters(1)["encap_packets"] == 3


@pytest.mark.parametrize("mode", ["strict", "rfc"])
def test_vxlan_reserved_bits(make_node: MakeNode, make_wire: MakeWire, mode: str) -> None:
    node, wire = make_node(1, 4, vxlan_reserved_bits=mode), make_wire("127.0.71.2")
    node.add_peer(1, 2, wire.port, encapsulation="vxlan")
    packet = build.udp(pod(2, 4), pod(1, 4))
    frame = build.frame(packet, destination=router_mac(1), source=router_mac(2))
    wire.send(build.vxlan(VNI, flags=0x88, reserved_byte=1) + frame, node.address, node.port("vxlan"))
    node.decap("vxlan")
    assert len(node.pods_get()) == (mode == "rfc")
    assert node.dropped("decap") == ({} if mode == "rfc" else {"tunnel_flags": 1})


def test_decap_of_a_descriptor_that_is_no_receiver(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    with pytest.raises(KeyError):
        node.pump.decap(node.tap.fileno())


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget_reads_nothing(make_node: MakeNode, make_wire: MakeWire, budget: int) -> None:
    node, wire = make_node(1, 4), make_wire("127.0.71.2")
    node.add_peer(1, 2, wire.port)
    node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4))))
    wire.send(b"anything", node.address, node.port("geneve"))
    wait_readable(node.receivers["geneve"])
    assert node.pump.encap(budget) == 0
    assert node.pump.decap(node.receivers["geneve"], budget) == 0
    assert node.received("encap") == node.received("decap") == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vnet_header_size", 0),
        ("vnet_header_size", 9),
        ("vnet_header_size", 1_000),
        ("router_mac", bytes(5)),
        ("gateway_mac", bytes(7)),
        ("vni", -1),
        ("vni", 1 << 24),
        ("vxlan_reserved_bits", "lenient"),
    ],
)
def test_a_bad_argument_is_refused_by_name(make_node: MakeNode, name: str, value: object) -> None:
    arguments: dict[str, object] = {
        "tap_fd": 0,
        "vnet_header_size": 10,
        "router_mac": router_mac(1),
        "gateway_mac": gateway_mac(1),
        "vni": VNI,
        "prefixes": PrefixTable(),
        "peers": PeerTable(),
    }
    with pytest.raises(ValueError, match=name):
        Pump(**(arguments | {name: value}))  # type: ignore[arg-type]


def test_bad_descriptors_and_families_are_refused(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    with pytest.raises(ValueError, match="encapsulation"):
        node.pump.add_receiver(0, "gre")
    with pytest.raises(ValueError, match="family"):
        node.pump.add_sender(0, socket.AF_UNIX)


def test_counters_name_every_reason_in_lower_case(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    names = {reason.name.lower() for reason in DropReason}
    for direction in ("encap", "decap"):
        assert set(node.pump.drops()[direction]) == names
        assert set(node.pump.counters()[direction]) == {
            "received",
            "forwarded",
            "forwarded_bytes",
            "probes",
            "drops",
        }


def test_the_oracle_sends_what_the_pump_sends(make_node: MakeNode, make_wire: MakeWire) -> None:
    """The soak trusts the oracle's journeys: here they are held to a case worked by hand."""
    node, wire = make_node(1, 4), make_wire("127.0.71.2")
    node.add_peer(1, 2, wire.port)
    packet = build.udp(pod(1, 4), pod(2, 4), tos=2)
    answer = journeys.encap(node.oracle, node.virtio(), node.frame(packet))
    header = build.geneve(VNI) + build.frame(packet, destination=router_mac(2), source=router_mac(1))
    assert answer == journeys.Sent(slot=1, datagram=header, ecn=2)
