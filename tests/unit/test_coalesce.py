"""Merging to superframes: each rule as a case that merges and its twin, one field apart, that must not.

Every case is also held to the oracle, and to this: what is merged, cut again, is what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fastpath.drops import DropReason
from fastpath.offload.coalesce import merge
from fastpath.wire.classify import classify
from tests.packets import build
from tests.packets.transport import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    FIN,
    NEEDS_CSUM,
    PSH,
    RST,
    SYN,
    UDP,
    URG,
    VIRTIO,
    Packet,
)
from tests.reference import coalesce as oracle
from tests.reference import segment
from tests.reference.checksum import ipv4_header_is_valid, transport_is_valid

NOTHING_ASKED = bytes(10)
SIZE = 100

ENDS4 = ("10.2.0.2", "10.1.0.2")
ENDS6 = ("fd00:2::2", "fd00:1::2")
TCP4 = Packet(*ENDS4, payload=b"1" * SIZE)
TCP6 = Packet(*ENDS6, payload=b"1" * SIZE)
UDP4 = Packet(*ENDS4, payload=b"1" * SIZE, protocol=UDP)
UDP6 = Packet(*ENDS6, payload=b"1" * SIZE, protocol=UDP)
TCP = {"TCP over IPv4": TCP4, "TCP over IPv6": TCP6}
IPV4 = {"TCP over IPv4": TCP4, "UDP over IPv4": UDP4}
IPV6 = {"TCP over IPv6": TCP6, "UDP over IPv6": UDP6}
EVERY = IPV4 | IPV6

each = pytest.mark.parametrize("packet", EVERY.values(), ids=EVERY)
each_tcp = pytest.mark.parametrize("packet", TCP.values(), ids=TCP)
each_udp = pytest.mark.parametrize("packet", [UDP4, UDP6], ids=["UDP over IPv4", "UDP over IPv6"])


def train(first: Packet, count: int, last: int = SIZE) -> list[Packet]:
    """What a sender sends in `count` packets; the last has a payload of `last` bytes."""
    packets = [first]
    for number in range(1, count):
        size = last if number == count - 1 else len(first.payload)
        packets.append(packets[-1].followed_by(bytes([0x31 + number % 64]) * size))
    return packets


def merged(frames: list[bytes], **switches: bool) -> list[tuple[bytes, bytes]]:
    written = merge(frames, **switches)
    assert written == oracle.merge(frames, **switches)
    return written


def groups(packets: list[Packet], **switches: bool) -> list[int]:
    """How many packets were put into each frame written."""
    frames = [packet.frame() for packet in packets]
    pieces = [apart(virtio, frame) for virtio, frame in merged(frames, **switches)]
    assert sorted(piece for group in pieces for piece in group) == sorted(
        unpadded(packet) for packet in packets
    ), "what is merged, cut again, is what came"
    return [len(group) for group in pieces]


def apart(virtio: bytes, frame: bytes) -> list[bytes]:
    if virtio == NOTHING_ASKED:
        return [frame]
    cut = segment.cut(virtio, frame)
    assert isinstance(cut, list)
    return cut


def unpadded(packet: Packet) -> bytes:
    return packet.but(padding=b"").frame()


@dataclass(frozen=True)
class Rule:
    """What is true of both packets and they merge, or of the second only and they must not."""

    name: str
    where: dict[str, Packet]
    second: dict[str, Any]
    both: dict[str, Any] | None = None
    """Where the second's value alone does not say what they would share."""


RULES = [
    Rule("TTL or hop limit", EVERY, {"ttl": 63}),
    Rule("DSCP", EVERY, {"tos": 0x2E << 2}),
    Rule("ECN: ECT(0)", EVERY, {"tos": 2}),
    Rule("ECN: CE", EVERY, {"tos": 3}),
    Rule("flow label", IPV6, {"flow_label": 0xFFFFF}),
    Rule("lowest bit of the flow label", IPV6, {"flow_label": 1}),
    Rule("DF", IPV4, {"dont_fragment": False}),
    Rule("source port", EVERY, {"source_port": 1}),
    Rule("destination port", EVERY, {"destination_port": 1}),
    Rule("acknowledgement", TCP, {"acknowledgement": 0xFF000007}),
    Rule("window", TCP, {"window": 0x0301}),
    Rule("ECE", TCP, {"flags": ACK | ECE}),
    Rule("AccECN's AE", TCP, {"reserved_bits": 1}),
    Rule("reserved bits", TCP, {"reserved_bits": 8}),
    Rule("urgent pointer", TCP, {"urgent": 1}),
    Rule("options", TCP, {"tcp_options": bytes([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])}),
    Rule("the last byte of the options", TCP, {"tcp_options": b"\1\1\1\1"}, {"tcp_options": b"\1\1\1\0"}),
    Rule("length of the options", TCP, {"tcp_options": b"\1" * 8}, {"tcp_options": b"\1" * 4}),
]

each_rule = pytest.mark.parametrize(
    ("rule", "packet"),
    [
        pytest.param(rule, packet, id=f"{rule.name}: {name}")
        for rule in RULES
        for name, packet in rule.where.items()
    ],
)


class TestOneRuleEach:
    @each_rule
    def test_equal_merges(self, rule: Rule, packet: Packet) -> None:
        assert groups(train(packet.but(**(rule.both or rule.second)), 3)) == [3]

    @each_rule
    def test_unequal_does_not(self, rule: Rule, packet: Packet) -> None:
        first = packet.but(**(rule.both or {}))
        second = first.followed_by(b"2" * SIZE, **rule.second)
        assert groups([first, second]) == [1, 1]

    @each
    def test_addresses(self, packet: Packet) -> None:
        for changed in (
            {"source": packet.source[:-1] + "3"},
            {"destination": packet.destination[:-1] + "3"},
        ):
            assert groups([packet, packet.followed_by(b"2" * SIZE, **changed)]) == [1, 1]
            assert groups(train(packet.but(**changed), 2)) == [2]

    def test_one_flows_segment_is_not_anothers(self) -> None:
        """TCP and UDP between the same ports; IPv4 and IPv6."""
        assert groups([TCP4, UDP4, TCP6, UDP6]) == [1, 1, 1, 1]
        assert groups([flow for packet in EVERY.values() for flow in train(packet, 2)]) == [2, 2, 2, 2]


class TestIpv4:
    @pytest.mark.parametrize("packet", IPV4.values(), ids=IPV4)
    def test_without_df_the_identification_must_count_upwards(self, packet: Packet) -> None:
        """A router may fragment such packets, and then the ID says which pieces belong together."""
        first = packet.but(dont_fragment=False, identification=0xFFFF)
        assert groups(train(first, 4)) == [4]
        for wrong in (0xFFFF, 1, 0xFFFE):
            second = first.followed_by(b"2" * SIZE, identification=wrong)
            assert groups([first, second]) == [1, 1]

    @pytest.mark.parametrize("packet", IPV4.values(), ids=IPV4)
    @pytest.mark.parametrize("step", [0, 2, -1, 0x8000])
    def test_with_df_the_identification_means_nothing(self, packet: Packet, step: int) -> None:
        """RFC 6864 section 4.1: Linux sends zero, OpenBSD random ones."""
        first = packet.but(identification=500)
        second = first.followed_by(b"2" * SIZE, identification=500 + step)
        ((virtio, frame),) = merged([first.frame(), second.frame()])
        assert frame[18:20] == (500).to_bytes(2, "big")
        assert virtio != NOTHING_ASKED

    @pytest.mark.parametrize("packet", IPV4.values(), ids=IPV4)
    def test_options_are_never_merged(self, packet: Packet) -> None:
        """They may mean something in each packet."""
        assert groups(train(packet.but(ip_options=b"\1\1\1\1"), 3)) == [1, 1, 1]

    @pytest.mark.parametrize("packet", IPV4.values(), ids=IPV4)
    @pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "second", "last"])
    @pytest.mark.parametrize("at", [4, 10], ids=["identification", "checksum"])
    def test_a_wrong_header_checksum_is_not_laundered(self, packet: Packet, which: int, at: int) -> None:
        """Cutting writes right ones, so a packet that the stack would drop may not be merged."""
        frames = [one.frame() for one in train(packet, 3)]
        frames[which] = flipped(frames[which], 14 + at)
        written = merged(frames)
        assert (NOTHING_ASKED, frames[which]) in written
        assert not ipv4_header_is_valid(frames[which][14:])


class TestIpv6:
    @pytest.mark.parametrize("packet", IPV6.values(), ids=IPV6)
    def test_extension_headers_are_never_merged(self, packet: Packet) -> None:
        assert groups(train(packet.but(extensions=(DESTINATION_OPTIONS,)), 3)) == [1, 1, 1]


class TestTcp:
    @each_tcp
    @pytest.mark.parametrize(
        "step", [1, -1, SIZE, -SIZE, 1 << 31], ids=["gap", "overlap", "hole", "repeated", "far away"]
    )
    def test_only_the_next_bytes_of_the_stream(self, packet: Packet, step: int) -> None:
        second = packet.followed_by(b"2" * SIZE)
        assert groups([packet, second]) == [2]
        elsewhere = second.but(sequence=second.sequence + step & 0xFFFFFFFF)
        assert groups([packet, elsewhere]) == [1, 1]

    @each_tcp
    def test_the_sequence_wraps(self, packet: Packet) -> None:
        assert groups(train(packet.but(sequence=0xFFFFFFFF - SIZE), 4)) == [4]

    @each_tcp
    @pytest.mark.parametrize("flag", [FIN, SYN, RST, URG, CWR], ids=["FIN", "SYN", "RST", "URG", "CWR"])
    def test_a_flag_that_marks_one_packet_goes_alone(self, packet: Packet, flag: int) -> None:
        before, marked, after, last = train(packet, 4)
        assert groups([before, marked.but(flags=ACK | flag), after, last]) == [1, 1, 2]
        assert groups([before.but(flags=ACK | flag), marked, after]) == [1, 2]

    @each_tcp
    def test_a_segment_without_ack_goes_alone(self, packet: Packet) -> None:
        assert groups(train(packet.but(flags=0), 2)) == [1, 1]
        assert groups(train(packet.but(flags=PSH), 2)) == [1, 1]

    @each_tcp
    @pytest.mark.parametrize("pushing", [0, 1, 2, 3])
    def test_psh_closes(self, packet: Packet, pushing: int) -> None:
        packets = train(packet, 4)
        packets[pushing] = packets[pushing].but(flags=ACK | PSH)
        assert groups(packets) == [count for count in (pushing + 1, 3 - pushing) if count]

    @each_tcp
    def test_an_acknowledgement_alone_goes_alone_and_in_its_place(self, packet: Packet) -> None:
        """It is never merged, and what follows it is not put before it."""
        first, second, third = train(packet, 3)
        bare = second.but(payload=b"", acknowledgement=8)
        assert groups([first, bare, second.but(acknowledgement=8), third]) == [1, 1, 1, 1]
        written = merged([one.frame() for one in (first, bare, second, third)])
        assert [frame for _, frame in written][:2] == [first.frame(), bare.frame()]

    @each_tcp
    def test_a_header_length_that_lies(self, packet: Packet) -> None:
        first, second = (one.frame() for one in train(packet, 2))
        at = 14 + packet.ip_header_length + 12
        for words in (0, 4, 15):
            lying = second[:at] + bytes([words << 4]) + second[at + 1 :]
            assert [frame for _, frame in merged([first, lying])] == [first, lying]


class TestUdp:
    @each_udp
    def test_a_checksum_of_zero_is_never_merged(self, packet: Packet) -> None:
        """There is none to verify (RFC 768)."""
        at = 14 + packet.ip_header_length + 6
        frames = [one.frame() for one in train(packet, 3)]
        zero = [frame[:at] + b"\0\0" + frame[at + 2 :] for frame in frames]
        assert merged(zero) == [(NOTHING_ASKED, frame) for frame in zero]
        assert merged([zero[0], *frames[1:]])[0] == (NOTHING_ASKED, zero[0])

    @each_udp
    @pytest.mark.parametrize("length", [0, 7, 8 + SIZE - 1, 8 + SIZE + 1, 0xFFFF])
    def test_a_length_that_lies(self, packet: Packet, length: int) -> None:
        at = 14 + packet.ip_header_length + 4
        frames = [one.frame() for one in train(packet, 2)]
        lying = frames[1][:at] + length.to_bytes(2, "big") + frames[1][at + 2 :]
        assert merged([frames[0], lying]) == [(NOTHING_ASKED, frames[0]), (NOTHING_ASKED, lying)]

    @each_udp
    def test_an_empty_datagram_goes_alone_and_in_its_place(self, packet: Packet) -> None:
        first, second, third = train(packet, 3)
        assert groups([first, second.but(payload=b""), second, third]) == [1, 1, 2]


class TestSizes:
    @each
    def test_equal_sizes_merge(self, packet: Packet) -> None:
        assert groups(train(packet, 10)) == [10]

    @each
    @pytest.mark.parametrize("last", [1, 2, SIZE - 1])
    def test_a_shorter_one_is_the_last(self, packet: Packet, last: int) -> None:
        packets = train(packet, 4, last)
        assert groups(packets) == [4]
        assert groups([*packets, packets[-1].followed_by(b"x" * last)]) == [4, 1]

    @each
    def test_a_longer_one_begins_anew(self, packet: Packet) -> None:
        assert groups(train(packet, 3, SIZE + 1)) == [2, 1]

    @each
    def test_one_alone_is_written_as_it_came(self, packet: Packet) -> None:
        assert merged([packet.frame()]) == [(NOTHING_ASKED, packet.frame())]

    @each
    @pytest.mark.parametrize("count", [63, 64, 65, 128, 129])
    def test_at_most_64_packets(self, packet: Packet, count: int) -> None:
        assert groups(train(packet, count)) == [64] * (count // 64) + ([count % 64] if count % 64 else [])

    @each
    def test_at_most_65535_bytes(self, packet: Packet) -> None:
        size, headers = 8_000, packet.headers_length
        packets = train(packet.but(payload=bytes(size)), 9, size)
        fits = 65_535 - headers - 8 * size
        assert groups(train(packets[0], 9, fits)) == [9]
        assert groups(train(packets[0], 9, fits + 1)) == [8, 1]
        assert groups(packets) == [8, 1]

    @each
    def test_padding_behind_the_packet_is_no_payload(self, packet: Packet) -> None:
        short = [one.but(padding=b"\xaa" * 18) for one in train(packet.but(payload=b"1"), 3, 1)]
        assert groups(short) == [3]
        ((_, frame),) = merged([one.frame() for one in short])
        assert len(frame) == 14 + packet.headers_length + 3

    @each
    @pytest.mark.parametrize("count", [2, 3])
    def test_the_smallest_payloads(self, packet: Packet, count: int) -> None:
        assert groups(train(packet.but(payload=b"1"), count, 1)) == [count]


class TestWhatIsWritten:
    @each
    def test_the_superframe_is_what_the_sender_would_have_handed_over(self, packet: Packet) -> None:
        packets = train(packet, 4, 7)
        whole = packet.but(payload=b"".join(one.payload for one in packets))
        assert merged([one.frame() for one in packets]) == [whole.superframe(SIZE)]

    @each_tcp
    def test_psh_of_the_last_is_the_superframes(self, packet: Packet) -> None:
        packets = train(packet, 3)
        packets[2] = packets[2].but(flags=ACK | PSH)
        whole = packet.but(payload=b"".join(one.payload for one in packets), flags=ACK | PSH)
        assert merged([one.frame() for one in packets]) == [whole.superframe(SIZE)]

    @each
    def test_the_inputs_are_left_as_they_are(self, packet: Packet) -> None:
        frames = [one.frame() for one in train(packet, 3)]
        copies = [bytes(bytearray(frame)) for frame in frames]
        merge(frames)
        assert frames == copies


def flipped(frame: bytes, at: int) -> bytes:
    at %= len(frame)
    return frame[:at] + bytes([frame[at] ^ 0x10]) + frame[at + 1 :]


class TestCorruption:
    """What is merged is trusted by the stack. So a packet whose checksum is wrong goes alone and unmarked:
    the stack finds it out."""

    @each
    @pytest.mark.parametrize("wrong", [0, 1, 2, 3, 4], ids=["first", "second", "third", "fourth", "last"])
    @pytest.mark.parametrize("where", [-1, 14 + 60], ids=["the last byte", "a byte within"])
    def test_one_corrupt_packet(self, packet: Packet, wrong: int, where: int) -> None:
        frames = [one.frame() for one in train(packet, 5)]
        frames[wrong] = flipped(frames[wrong], where)
        assert not transport_is_valid(frames[wrong][14:])
        written = merged(frames)
        assert (NOTHING_ASKED, frames[wrong]) in written
        others = [piece for virtio, frame in written for piece in apart(virtio, frame)]
        assert others == frames, "nobody else is held back, or put out of order"

    @each
    def test_nothing_but_corrupt_packets(self, packet: Packet) -> None:
        frames = [flipped(one.frame(), -1) for one in train(packet, 5)]
        assert merged(frames) == [(NOTHING_ASKED, frame) for frame in frames]

    @each
    def test_corruption_in_each_byte_of_a_packet(self, packet: Packet) -> None:
        """Whatever byte it hits: none is merged that verification would have refused."""
        first, second, third = (one.frame() for one in train(packet, 3))
        good = {without_identification(frame) for frame in (first, third)}
        for at in range(14, len(second)):
            broken = flipped(second, at)
            if isinstance(classify(broken), DropReason):
                continue  # it does not come so far
            for virtio, frame in merged([first, broken, third]):
                for piece in apart(virtio, frame):
                    alone = (virtio, piece) == (NOTHING_ASKED, broken[: len(piece)])
                    assert alone or without_identification(piece) in good


def without_identification(frame: bytes) -> bytes:
    """The frame without what cutting makes anew where DF says that it means nothing."""
    if frame[12:14] != b"\x08\x00":
        return frame
    return frame[:18] + frame[20:24] + frame[26:]


class TestPartialChecksums:
    """From a peer on the same host, whose kernel never finished them because no wire was crossed."""

    @each
    def test_alone_it_is_marked_as_such(self, packet: Packet) -> None:
        start, offset = 14 + packet.ip_header_length, 6 if packet.protocol == UDP else 16
        expected = VIRTIO.pack(NEEDS_CSUM, 0, 0, 0, start, offset)
        assert merged([packet.partial()]) == [(expected, packet.partial())]

    @each
    def test_a_train_of_them_merges(self, packet: Packet) -> None:
        packets = train(packet, 4, 7)
        whole = packet.but(payload=b"".join(one.payload for one in packets))
        assert merged([one.partial() for one in packets]) == [whole.superframe(SIZE)]

    @each
    @pytest.mark.parametrize("complete", [0, 1, 2, 3])
    def test_complete_ones_among_them(self, packet: Packet, complete: int) -> None:
        packets = train(packet, 4)
        whole = packet.but(payload=b"".join(one.payload for one in packets))
        frames = [one.partial() for one in packets]
        frames[complete] = packets[complete].frame()
        assert merged(frames) == [whole.superframe(SIZE)]

    @each
    @pytest.mark.parametrize("wrong", [0, 1, 2])
    def test_a_corrupt_one_among_them(self, packet: Packet, wrong: int) -> None:
        """A partial checksum says nothing of the payload, but a complete and wrong one does."""
        packets = train(packet, 3)
        frames = [one.partial() for one in packets]
        frames[wrong] = flipped(packets[wrong].frame(), -1)
        assert (NOTHING_ASKED, frames[wrong]) in merged(frames)

    @each
    def test_of_a_protocol_that_is_not_merged(self, packet: Packet) -> None:
        """The mark does not depend on the merging."""
        written = merged([one.partial() for one in train(packet, 3)], tcp=False, udp=False)
        assert [virtio[0] for virtio, _ in written] == [NEEDS_CSUM] * 3


class TestOrder:
    @each
    def test_interleaved_flows_each_merge_and_leave_as_they_began(self, packet: Packet) -> None:
        flows = [train(packet.but(source_port=port), 5) for port in (1, 2, 3)]
        interleaved = [flow[number] for number in range(5) for flow in flows]
        written = merged([one.frame() for one in interleaved])
        assert [apart(*one) for one in written] == [[one.frame() for one in flow] for flow in flows]

    @each
    @pytest.mark.parametrize("flows", [127, 128, 129, 300])
    def test_more_flows_than_chains(self, packet: Packet, flows: int) -> None:
        """The chains leave and begin anew; flows whose hashes meet in a bucket merge less, that is all."""
        trains = [train(packet.but(source_port=1 + port), 4) for port in range(flows)]
        frames = [flow[number].frame() for number in range(4) for flow in trains]
        pieces = [piece for one in merge(frames) for piece in apart(*one)]
        assert sorted(pieces) == sorted(frames)
        position = {frame: at for at, frame in enumerate(pieces)}
        for flow in trains:
            places = [position[one.frame()] for one in flow]
            assert places == sorted(places)

    @pytest.mark.parametrize("family", [4, 6])
    def test_a_fragment_is_not_overtaken(self, family: int) -> None:
        """It may be of any flow between its addresses: its ports are not there to be read."""
        packet, ends = (UDP4, ENDS4) if family == 4 else (UDP6, ENDS6)
        first, second, third = train(packet, 3)
        pieces = [
            build.frame(piece, destination=packet.ethernet[:6], source=packet.ethernet[6:])
            for piece in build.fragments(*ends)
        ]
        written = merged([first.frame(), *pieces, second.frame(), third.frame()])
        assert [frame for _, frame in written][:-1] == [first.frame(), *pieces]
        assert apart(*written[-1]) == [second.frame(), third.frame()]

    def test_a_packet_with_extension_headers_is_not_overtaken(self) -> None:
        first, second, third = train(UDP6, 3)
        assert groups([first, second.but(extensions=(DESTINATION_OPTIONS,)), third]) == [1, 1, 1]

    def test_a_fragment_between_others_is_none_of_their_business(self) -> None:
        elsewhere = build.frame(
            build.fragments("10.2.0.9", "10.1.0.2")[0],
            destination=UDP4.ethernet[:6],
            source=UDP4.ethernet[6:],
        )
        first, second = train(UDP4, 2)
        written = merged([first.frame(), elsewhere, second.frame()])
        assert [len(apart(*one)) for one in written] == [2, 1]

    def test_pings_are_never_merged_and_hold_up_nobody(self) -> None:
        ping = build.frame(build.ping(*ENDS4), destination=TCP4.ethernet[:6], source=TCP4.ethernet[6:])
        first, second = train(TCP4, 2)
        written = merged([first.frame(), ping, second.frame(), ping])
        assert [len(apart(*one)) for one in written] == [2, 1, 1]


class TestSwitches:
    @each
    @pytest.mark.parametrize(("tcp", "udp"), [(True, True), (True, False), (False, True), (False, False)])
    def test_each_is_its_own_protocols(self, packet: Packet, tcp: bool, udp: bool) -> None:
        on = udp if packet.protocol == UDP else tcp
        assert groups(train(packet, 3), tcp=tcp, udp=udp) == ([3] if on else [1, 1, 1])


def test_a_frame_that_is_none_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="FRAME_SHORT"):
        merge([b""])
