"""Superframes through whole pumps: what a pod hands over on one node, a pod's stack makes of it on the other.

Merging, trains and runs are the pumps' own business: whichever of them is on, the packets are the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.packets import build
from tests.packets.transport import ACK, CWR, DESTINATION_OPTIONS, FIN, PSH, UDP, VIRTIO, Packet
from tests.pipeline.harness import POD_MTU, VNI, Node, Wire, gateway_mac, join, pod, router_mac, wire_address
from tests.reference import checksum, journeys, segment

MakeNode = Callable[..., Node]
MakeWire = Callable[[str], Wire]

FROM_PODS = router_mac(1) + gateway_mac(1)
TO_PODS = gateway_mac(2) + router_mac(2)
NOTHING_ASKED = bytes(10)

TCP4 = Packet(pod(1, 4), pod(2, 4), ethernet=FROM_PODS)
TCP6 = Packet(pod(1, 6), pod(2, 6), ethernet=FROM_PODS)
KINDS = {
    "TCP over IPv4": TCP4,
    "TCP over IPv6": TCP6,
    "UDP over IPv4": TCP4.but(protocol=UDP),
    "UDP over IPv6": TCP6.but(protocol=UDP),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def two(make_node: MakeNode, encapsulation: str) -> tuple[Node, Node]:
    """Nodes 1 and 2, peers of each other over IPv4, that merge."""
    one, other = make_node(1, 4, senders=1), make_node(2, 4)
    join(one, other, encapsulation)
    merge(other, tcp=True, udp=True)
    return one, other


def merge(node: Node, *, tcp: bool, udp: bool) -> None:
    node.pump.set_offload("merge_tcp", tcp)
    node.pump.set_offload("merge_udp", udp)


def random_bytes(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def written_to(node: Node) -> list[tuple[bytes, bytes]]:
    """(virtio header, frame) of what reached the TAP."""
    written: list[tuple[bytes, bytes]] = []
    while True:
        try:
            message = node.tap.recv(1 << 17)
        except BlockingIOError:
            return written
        written.append((message[: node.vnet_header_size], message[node.vnet_header_size :]))


def as_packets(written: list[tuple[bytes, bytes]]) -> list[bytes]:
    """What a stack makes of them: superframes apart, partial checksums finished."""
    packets: list[bytes] = []
    for virtio, frame in written:
        flags, gso_type, _, _, start, offset = VIRTIO.unpack(virtio)
        if gso_type:
            cut = segment.cut(virtio, frame)
            assert isinstance(cut, list), "written as a superframe, and is none"
            packets += cut
        else:
            packets.append(finished(frame, start, start + offset) if flags & 1 else frame)
    return packets


def finished(frame: bytes, start: int, at: int) -> bytes:
    value = checksum.checksum(frame[start:]) or (0xFFFF if at - start == 6 else 0)
    return frame[:at] + value.to_bytes(2, "big") + frame[at + 2 :]


def carry(
    one: Node, other: Node, encapsulation: str, messages: list[tuple[bytes, bytes]], packets: int
) -> None:
    for virtio, frame in messages:
        one.pods_send(frame, virtio)
    assert one.pump.encap() == len(messages)
    other.decap(encapsulation, packets)


def cut(packet: Packet, size: int) -> list[bytes]:
    segments = segment.cut(*packet.superframe(size))
    assert isinstance(segments, list)
    return [TO_PODS + frame[12:] for frame in segments]


class TestWholeWay:
    @each_kind
    @pytest.mark.parametrize("length", [1, 99, 100, 101, 200, 4_001, 6_400])
    def test_a_superframe_arrives_as_it_left(
        self, two: tuple[Node, Node], encapsulation: str, kind: Packet, length: int
    ) -> None:
        one, other = two
        packet = kind.but(payload=random_bytes(length), tos=2, identification=9)
        carry(one, other, encapsulation, [packet.superframe(100)], -(-length // 100))
        arrived = packet.but(ethernet=TO_PODS)
        expected = arrived.superframe(100) if length > 100 else (NOTHING_ASKED, arrived.frame())
        assert written_to(other) == [expected]
        for node, direction in ((one, "encap"), (other, "decap")):
            assert node.received(direction) == node.forwarded(direction) == -(-length // 100)
            node.assert_counters_close()

    @each_kind
    @pytest.mark.parametrize("size", [1_398, 536, 1_000])
    def test_as_long_as_they_come(
        self, two: tuple[Node, Node], encapsulation: str, kind: Packet, size: int
    ) -> None:
        one, other = two
        packet = kind.but(payload=random_bytes(65_535 - kind.headers_length))
        size = min(size, POD_MTU - kind.headers_length)
        segments = cut(packet, size)
        carry(one, other, encapsulation, [packet.superframe(size)], len(segments))
        assert as_packets(written_to(other)) == segments

    @pytest.mark.parametrize("kind", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_more_segments_than_the_outbox_has_blocks(
        self, two: tuple[Node, Node], encapsulation: str, kind: Packet, size: int
    ) -> None:
        one, other = two
        packet = kind.but(payload=random_bytes(1_200 * size))
        segments = cut(packet, size)
        assert len(segments) == 1_200
        one.pods_send(packet.superframe(size)[1], packet.superframe(size)[0])
        assert one.pump.encap() == 1
        arrived: list[bytes] = []
        while len(arrived) < 1_200:
            other.decap(encapsulation)
            arrived += as_packets(written_to(other))
        assert arrived == segments

    @pytest.mark.parametrize("kind", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    @pytest.mark.parametrize("flags", [ACK | PSH, ACK | FIN | PSH, ACK | CWR], ids=["PSH", "FIN", "CWR"])
    def test_flags(self, two: tuple[Node, Node], encapsulation: str, kind: Packet, flags: int) -> None:
        one, other = two
        packet = kind.but(payload=random_bytes(950), flags=flags)
        carry(one, other, encapsulation, [packet.superframe(100)], 10)
        written = written_to(other)
        assert as_packets(written) == cut(packet, 100)
        # FIN and CWR each mark one packet, which is not merged.
        assert len(written) == (1 if flags == ACK | PSH else 2)

    def test_extension_headers(self, two: tuple[Node, Node], encapsulation: str) -> None:
        one, other = two
        packet = TCP6.but(payload=random_bytes(950), extensions=(DESTINATION_OPTIONS,))
        carry(one, other, encapsulation, [packet.superframe(100)], 10)
        assert as_packets(written_to(other)) == cut(packet, 100)

    def test_many_of_many_flows_with_small_frames_between(
        self, two: tuple[Node, Node], encapsulation: str
    ) -> None:
        one, other = two
        rng = random.Random(7)
        flows = [kind.but(source_port=port) for kind in KINDS.values() for port in range(5)]
        for _ in range(20):
            messages, packets = [], []
            for _ in range(12):
                at = rng.randrange(len(flows))
                length = rng.choice((1, 80, 1_000, 5_000))
                flows[at] = flows[at].followed_by(rng.randbytes(length))
                messages.append(flows[at].superframe(rng.choice((100, 1_398 - 12))))
                packets += cut(flows[at], VIRTIO.unpack(messages[-1][0])[3])
                flows[at] = flows[at].but(identification=flows[at].identification + 100 & 0xFFFF)
            carry(one, other, encapsulation, messages, len(packets))
            arrived = as_packets(written_to(other))
            assert by_flow(arrived) == by_flow(packets)
        one.assert_counters_close()
        other.assert_counters_close()
        assert one.dropped("encap") == other.dropped("decap") == {}


def by_flow(packets: list[bytes]) -> dict[bytes, list[bytes]]:
    """Each flow's packets in their order, without the ID that DF makes meaningless."""
    flows: dict[bytes, list[bytes]] = {}
    for packet in packets:
        is_ipv4 = packet[12:14] == b"\x08\x00"
        key = packet[23:24] + packet[34:36] if is_ipv4 else packet[20:21] + packet[54:56]
        flows.setdefault(packet[12:14] + key, []).append(
            packet[:18] + packet[20:24] + packet[26:] if is_ipv4 else packet
        )
    return flows


class TestEveryCombination:
    """Of what the pumps themselves can do, over the same traffic: the same packets arrive."""

    @pytest.mark.parametrize(
        ("udp_segment", "gro", "tcp", "udp", "partial"), list(itertools.product([False, True], repeat=5))
    )
    def test_the_same_packets(
        self, make_node: MakeNode, udp_segment: bool, gro: bool, tcp: bool, udp: bool, partial: bool
    ) -> None:
        one, other = make_node(1, 4, senders=1), make_node(2, 4, gro=gro)
        join(one, other, "geneve")
        if partial:
            for here, there in ((one, other), (other, one)):
                agree_on_partial_checksums(here, there)
        one.pump.set_offload("udp_segment", udp_segment)
        merge(other, tcp=tcp, udp=udp)
        messages, packets = [], []
        for number, kind in enumerate(KINDS.values()):
            packet = kind.but(payload=random_bytes(3_333 + number), identification=number)
            messages.append(packet.superframe(300))
            packets += cut(packet, 300)
            alone = packet.followed_by(random_bytes(77), sequence=1 << 31)
            messages.append((NOTHING_ASKED, alone.frame()))
            packets.append(alone.but(ethernet=TO_PODS).frame())
        for frame in others():
            messages.append((NOTHING_ASKED, frame))
            packets.append(TO_PODS + frame[12:])
        carry(one, other, "geneve", messages, len(packets))
        written = written_to(other)
        assert by_flow(as_packets(written)) == by_flow(packets)
        kinds = {VIRTIO.unpack(virtio)[1] for virtio, _ in written}
        assert kinds == {0} | ({1, 4} if tcp else set()) | ({5} if udp else set())
        assert one.dropped("encap") == other.dropped("decap") == {}


def others() -> list[bytes]:
    """What is neither cut nor merged: pings, and fragments of a datagram."""
    packets = []
    for family in (4, 6):
        ends = pod(1, family), pod(2, family)
        packets += [build.ping(*ends), *build.fragments(*ends)]
    return [build.frame(packet, destination=FROM_PODS[:6], source=FROM_PODS[6:]) for packet in packets]


def agree_on_partial_checksums(here: Node, there: Node) -> None:
    here.peers.set(
        1,
        encapsulation="geneve",
        vni=VNI,
        router_mac=router_mac(there.number),
        endpoint=ip_address(there.address).packed,
        port=there.port("geneve"),
        mtu=POD_MTU,
        partial_checksums=True,
    )


class TestSizes:
    """A superframe is as big as its segments: it is they that must fit the peer's MTU."""

    @each_kind
    def test_segments_of_exactly_the_mtu_pass(
        self, two: tuple[Node, Node], encapsulation: str, kind: Packet
    ) -> None:
        one, other = two
        size = POD_MTU - kind.headers_length
        packet = kind.but(payload=random_bytes(10 * size))
        carry(one, other, encapsulation, [packet.superframe(size)], 10)
        assert as_packets(written_to(other)) == cut(packet, size)

    @each_kind
    def test_one_byte_more_and_all_segments_are_too_big(self, two: tuple[Node, Node], kind: Packet) -> None:
        one, _ = two
        size = POD_MTU - kind.headers_length + 1
        virtio, frame = kind.but(payload=bytes(9 * size + 1)).superframe(size)
        one.pods_send(frame, virtio)
        one.pump.encap()
        assert one.dropped("encap") == {"too_big": 10}
        one.assert_counters_close()

    @each_kind
    def test_a_size_beyond_the_mtu_of_a_packet_below_it_passes(
        self, two: tuple[Node, Node], encapsulation: str, kind: Packet
    ) -> None:
        """One segment, and a size that does not matter."""
        one, other = two
        packet = kind.but(payload=random_bytes(500))
        carry(one, other, encapsulation, [packet.superframe(9_000)], 1)
        assert written_to(other) == [(NOTHING_ASKED, packet.but(ethernet=TO_PODS).frame())]

    @each_kind
    def test_a_superframe_that_lies_is_one_drop(self, two: tuple[Node, Node], kind: Packet) -> None:
        one, _ = two
        virtio, frame = kind.but(payload=bytes(1_000)).superframe(100, flags=0)
        one.pods_send(frame, virtio)
        one.pump.encap()
        assert one.dropped("encap") == {"virtio_header": 1}
        one.assert_counters_close()


class TestCorruption:
    """Somebody on the way flips a bit, and fixes the outer checksum as a sender would: each datagram of the
    train is judged by itself, and the corrupt packet goes on as corrupt as it was."""

    @each_kind
    @pytest.mark.parametrize("wrong", [0, 4, 9], ids=["first", "middle", "last"])
    def test_in_a_train(self, make_node: MakeNode, make_wire: MakeWire, kind: Packet, wrong: int) -> None:
        node, wire = make_node(2, 4), make_wire(wire_address(1, 4))
        node.add_peer(1, 1, wire.port)
        merge(node, tcp=True, udp=True)
        segments = segment.cut(*kind.but(payload=random_bytes(1_000)).superframe(100))
        assert isinstance(segments, list)
        segments = [router_mac(2) + router_mac(1) + frame[12:] for frame in segments]
        segments[wrong] = segments[wrong][:-5] + bytes([segments[wrong][-5] ^ 4]) + segments[wrong][-4:]
        train = b"".join(build.geneve(VNI) + frame for frame in segments)
        size = len(train) // len(segments)
        control = [(17, 103, size.to_bytes(2, "little"))]  # IPPROTO_UDP, UDP_SEGMENT
        wire.socket.sendmsg([train], control, 0, (node.address, node.port("geneve")))
        node.decap("geneve", len(segments))
        written = written_to(node)
        expected = [TO_PODS + frame[12:] for frame in segments]
        assert (NOTHING_ASKED, expected[wrong]) in written, "alone, and unmarked"
        assert as_packets(written) == expected
        assert len(written) == (2 if wrong in (0, 9) else 3), "the others are merged all the same"


class TestGarbage:
    """Superframes with bytes changed anywhere, in the virtio header too, are cut or dropped as the oracle
    says, and nothing is read or written beside them."""

    @pytest.mark.parametrize(
        "count", [20_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(1_200)])]
    )
    def test_is_cut_or_dropped_as_the_oracle_says(
        self, make_node: MakeNode, make_wire: MakeWire, count: int
    ) -> None:
        rng = random.Random(count)
        node, wire = make_node(1, 4, senders=1), make_wire(wire_address(2, 4))
        node.add_peer(1, 2, wire.port)
        packets, refused, reasons = 0, 0, set()
        for _ in range(count):
            kind = rng.choice(list(KINDS.values())).but(payload=rng.randbytes(rng.choice((1, 700, 3_000))))
            virtio, frame = kind.superframe(rng.choice((99, 536, 1_390, 1_440)))
            virtio = mutated(virtio, rng, (0, 0, 1))
            frame = mutated(frame, rng, (0, 1, 1, 3))[
                : rng.choice((len(frame), len(frame), rng.randrange(200)))
            ]
            node.pods_send(frame, virtio)
            node.pump.encap()
            datagrams = [datagram.payload[8:] for datagram in wire.get_now()]
            expected = encap(node, virtio, frame)
            if isinstance(expected, tuple):
                assert datagrams == []
                refused += expected[1]
                reasons.add(expected[0])
            else:
                assert but_for_checksums(virtio, datagrams) == but_for_checksums(virtio, expected)
                packets += len(expected)
        assert node.forwarded("encap") == packets
        assert sum(node.dropped("encap").values()) == refused
        assert {reason.lower() for reason in reasons} == set(node.dropped("encap"))
        assert {"VIRTIO_HEADER", "TOO_BIG", "IP_MALFORMED", "INNER_SOURCE"} <= reasons
        node.assert_counters_close()


def mutated(data: bytes, rng: random.Random, changes: tuple[int, ...]) -> bytes:
    """Some bytes changed, mostly among the headers."""
    changed = bytearray(data)
    for _ in range(rng.choice(changes)):
        at = rng.randrange(min(len(changed), rng.choice((14, 100, 4_000))))
        changed[at] = rng.choice((0, 0xFF, changed[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(changed)


def encap(node: Node, virtio: bytes, frame: bytes) -> list[bytes] | tuple[str, int]:
    """The inner frames that leave, or why none does and how many packets that is."""
    unlimited = replace(node.oracle, peers={1: replace(node.oracle.peers[1], mtu=1 << 16)})
    answer = journeys.encap(unlimited, virtio if virtio[1] == 0 else NOTHING_ASKED, frame)
    if isinstance(answer, journeys.Dropped):
        (reason,) = answer.reasons
        return reason, 1
    frames = [answer.datagram[8:]]
    if virtio[1] != 0:
        segments = segment.cut(virtio, frame)
        if isinstance(segments, str):
            return segments, 1
        frames = [answer.datagram[8:20] + one[12:] for one in segments]
    if len(frames[0]) - 14 > POD_MTU:
        return "TOO_BIG", len(frames)
    return frames


def but_for_checksums(virtio: bytes, frames: list[bytes]) -> list[bytes]:
    """A changed byte changes what a field's pseudo-header sum is worth: garbage has no right checksum."""
    flags, _, _, _, start, offset = VIRTIO.unpack(virtio)
    at = start + offset
    return [frame[:at] + frame[at + 2 :] for frame in frames] if flags & 1 else frames
