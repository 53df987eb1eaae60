"""Cutting superframes: each rule a case, worked by hand; the oracle agrees with all of them."""

from __future__ import annotations

import struct

import pytest

from fastpath.drops import DropReason
from fastpath.offload.segment import cut
from tests.packets import build
from tests.packets.transport import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    FIN,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    PSH,
    RST,
    SYN,
    UDP,
    URG,
    Packet,
)
from tests.reference import segment as oracle
from tests.reference.checksum import ipv4_header_is_valid, transport_is_valid

PAYLOAD = bytes(range(256)) * 12  # 3,072 bytes: three segments of 1,000 and one of 72
ENDS4 = ("10.1.0.2", "10.2.0.2")
ENDS6 = ("fd00:1::2", "fd00:2::2")
TCP4 = Packet(*ENDS4, payload=PAYLOAD, flags=ACK | PSH)
TCP6 = Packet(*ENDS6, payload=PAYLOAD, flags=ACK | PSH)
UDP4 = Packet(*ENDS4, payload=PAYLOAD, protocol=UDP)
UDP6 = Packet(*ENDS6, payload=PAYLOAD, protocol=UDP)
EVERY = [TCP4, TCP6, UDP4, UDP6]
EVERY_ID = ["TCP over IPv4", "TCP over IPv6", "UDP over IPv4", "UDP over IPv6"]


def cut_packets(packet: Packet, size: int, **header: int) -> list[bytes]:
    """The IP packets that the superframe is cut into."""
    virtio, frame = packet.superframe(size, **header)
    segments = cut(virtio, frame)
    assert isinstance(segments, list)
    assert segments == oracle.cut(virtio, frame)
    assert {segment[:14] for segment in segments} == {frame[:14]}
    return [segment[14:] for segment in segments]


def tcp_fields(packet: Packet, segments: list[bytes]) -> list[tuple[int, int]]:
    """Each segment's sequence number and flags."""
    at = packet.ip_header_length
    return [(int.from_bytes(one[at + 4 : at + 8], "big"), one[at + 13]) for one in segments]


def payloads(packet: Packet, segments: list[bytes]) -> list[bytes]:
    return [segment[packet.headers_length :] for segment in segments]


class TestEverySuperframe:
    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_is_what_its_sender_would_have_sent_piece_by_piece(self, packet: Packet) -> None:
        """The whole rule in one: each segment is the packet of that payload, at its place in the stream."""
        expected, at = [], packet.but(payload=PAYLOAD[:1_000], flags=ACK)
        for start in range(1_000, len(PAYLOAD), 1_000):
            expected.append(at.frame()[14:])
            at = at.followed_by(PAYLOAD[start : start + 1_000])
        expected.append(at.but(flags=packet.flags).frame()[14:])
        assert cut_packets(packet, 1_000) == expected

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    @pytest.mark.parametrize("size", [1, 2, 47, 1_023, 1_024, 1_025, 3_071])
    def test_segments_are_of_the_size_but_the_last(self, packet: Packet, size: int) -> None:
        pieces = payloads(packet, cut_packets(packet, size))
        assert b"".join(pieces) == PAYLOAD
        assert {len(piece) for piece in pieces[:-1]} == {size}
        assert 1 <= len(pieces[-1]) <= size

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    @pytest.mark.parametrize("size", [len(PAYLOAD), len(PAYLOAD) + 1, 0xFFFF])
    def test_less_than_two_segments_is_the_packet_itself(self, packet: Packet, size: int) -> None:
        assert cut_packets(packet, size) == [packet.frame()[14:]]

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    @pytest.mark.parametrize("size", [1, 999, 1_000, 1_001])
    def test_every_checksum_is_complete(self, packet: Packet, size: int) -> None:
        for segment in cut_packets(packet, size):
            assert transport_is_valid(segment)
            assert packet.family == 6 or ipv4_header_is_valid(segment)

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_odd_payloads_at_odd_places_are_summed_right(self, packet: Packet) -> None:
        odd = packet.but(payload=bytes(range(1, 255)) * 3 + b"\xff")
        for size in (3, 5, 7, 101):
            assert all(transport_is_valid(segment) for segment in cut_packets(odd, size))

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_padding_behind_the_packet_is_left_behind(self, packet: Packet) -> None:
        assert cut_packets(packet.but(padding=b"\xaa" * 9), 1_000) == cut_packets(packet, 1_000)

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_the_longest_packet_there_is(self, packet: Packet) -> None:
        longest = packet.but(payload=bytes(65_535 - packet.headers_length))
        segments = cut_packets(longest, 1_448)
        assert sum(map(len, payloads(packet, segments))) == 65_535 - packet.headers_length

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    @pytest.mark.parametrize("claimed", [0, 1, 14, 1_514, 0xFFFF])
    def test_the_header_length_is_not_believed(self, packet: Packet, claimed: int) -> None:
        """On a forwarding path it can be the length of the whole first packet."""
        assert cut_packets(packet, 1_000, header_length=claimed) == cut_packets(packet, 1_000)

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    @pytest.mark.parametrize("tos", [0, 1, 2, 3, 0xBB])
    def test_tos_and_ttl_are_each_segments(self, packet: Packet, tos: int) -> None:
        segments = cut_packets(packet.but(tos=tos, ttl=3, flow_label=0xABCDE), 1_000)
        word = 6 << 28 | tos << 20 | 0xABCDE
        head = bytes([0x45, tos]) if packet.family == 4 else word.to_bytes(4, "big")
        assert {segment[: len(head)] for segment in segments} == {head}
        assert {segment[8 if packet.family == 4 else 7] for segment in segments} == {3}


class TestIpv4:
    @pytest.mark.parametrize("packet", [TCP4, UDP4], ids=["TCP", "UDP"])
    @pytest.mark.parametrize("dont_fragment", [True, False], ids=["DF", "no DF"])
    def test_the_identification_counts_upwards(self, packet: Packet, dont_fragment: bool) -> None:
        segments = cut_packets(packet.but(identification=700, dont_fragment=dont_fragment), 1_000)
        assert [int.from_bytes(segment[4:6], "big") for segment in segments] == [700, 701, 702, 703]
        assert {segment[6] for segment in segments} == {0x40 if dont_fragment else 0}

    def test_and_wraps(self) -> None:
        segments = cut_packets(TCP4.but(identification=0xFFFE), 1_000)
        assert [int.from_bytes(segment[4:6], "big") for segment in segments] == [0xFFFE, 0xFFFF, 0, 1]

    def test_options_are_each_segments(self) -> None:
        router_alert = bytes([0x94, 4, 0, 0])
        segments = cut_packets(TCP4.but(ip_options=router_alert), 1_000)
        assert {segment[20:24] for segment in segments} == {router_alert}
        assert {segment[0] for segment in segments} == {0x46}

    def test_the_longest_headers(self) -> None:
        longest = TCP4.but(ip_options=b"\x01" * 40, tcp_options=b"\x01" * 40)
        assert len(cut_packets(longest, 1_000)) == 4

    def test_a_wrong_header_checksum_is_made_anew(self) -> None:
        """As the kernel does it: on its way to a TAP a packet has been through the stack that checks it."""
        virtio, frame = TCP4.superframe(1_000)
        assert cut(virtio, frame[:24] + b"\xde\xad" + frame[26:]) == cut(virtio, frame)


class TestIpv6:
    @pytest.mark.parametrize("packet", [TCP6, UDP6], ids=["TCP", "UDP"])
    @pytest.mark.parametrize(
        "extensions",
        [(DESTINATION_OPTIONS,), (0, DESTINATION_OPTIONS), (0, DESTINATION_OPTIONS, DESTINATION_OPTIONS)],
        ids=["destination options", "hop by hop too", "three"],
    )
    def test_extension_headers_are_each_segments(self, packet: Packet, extensions: tuple[int, ...]) -> None:
        extended = packet.but(extensions=extensions)
        segments = cut_packets(extended, 1_000)
        between = extended.partial()[14 + 40 : 14 + extended.ip_header_length]
        assert {segment[40 : extended.ip_header_length] for segment in segments} == {between}
        lengths = [len(segment) - 40 for segment in segments]
        assert [int.from_bytes(segment[4:6], "big") for segment in segments] == lengths

    def test_headers_as_long_as_we_cut_and_longer(self) -> None:
        fits = TCP6.but(extensions=(DESTINATION_OPTIONS,) * 9, tcp_options=b"\x01" * 40)
        assert 14 + fits.headers_length == 186
        assert len(cut_packets(fits, 1_000)) == 4
        assert cut(*fits.but(extensions=(DESTINATION_OPTIONS,) * 10).superframe(1_000)) == (
            DropReason.VIRTIO_HEADER
        )


class TestTcp:
    def test_sequence_numbers_advance_by_the_payload(self) -> None:
        fields = tcp_fields(TCP4, cut_packets(TCP4, 1_000))
        assert [sequence for sequence, _ in fields] == [1_000, 2_000, 3_000, 4_000]

    def test_and_wrap(self) -> None:
        packet = TCP4.but(sequence=0xFFFFFFFF - 999)
        fields = tcp_fields(packet, cut_packets(packet, 1_000))
        assert [sequence for sequence, _ in fields] == [0xFFFFFC18, 0, 1_000, 2_000]

    @pytest.mark.parametrize(
        ("flags", "cut_flags"),
        [
            pytest.param(ACK, [ACK] * 4, id="ACK on all"),
            pytest.param(ACK | PSH, [ACK, ACK, ACK, ACK | PSH], id="PSH on the last"),
            pytest.param(ACK | FIN, [ACK, ACK, ACK, ACK | FIN], id="FIN on the last"),
            pytest.param(ACK | FIN | PSH, [ACK, ACK, ACK, ACK | FIN | PSH], id="FIN and PSH on the last"),
            pytest.param(ACK | CWR, [ACK | CWR, ACK, ACK, ACK], id="CWR on the first"),
            pytest.param(ACK | ECE, [ACK | ECE] * 4, id="ECE on all"),
            pytest.param(
                ACK | ECE | CWR | PSH,
                [ACK | ECE | CWR, ACK | ECE, ACK | ECE, ACK | ECE | PSH],
                id="CWR, ECE and PSH",
            ),
            pytest.param(ACK | URG, [ACK | URG] * 4, id="URG on all"),
            pytest.param(SYN | ACK, [SYN | ACK] * 4, id="SYN on all (TCP Fast Open)"),
            pytest.param(RST, [RST] * 4, id="RST on all"),
        ],
    )
    def test_flags(self, flags: int, cut_flags: list[int]) -> None:
        for packet in (TCP4.but(flags=flags), TCP6.but(flags=flags)):
            assert [flags for _, flags in tcp_fields(packet, cut_packets(packet, 1_000))] == cut_flags

    def test_one_segment_keeps_all_flags(self) -> None:
        packet = TCP4.but(flags=FIN | PSH | CWR | ACK)
        assert tcp_fields(packet, cut_packets(packet, 4_000)) == [(1_000, FIN | PSH | CWR | ACK)]

    @pytest.mark.parametrize("packet", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    def test_the_ecn_bit_of_the_type_changes_nothing(self, packet: Packet) -> None:
        packet = packet.but(flags=ACK | CWR)
        kind = (GSO_TCPV4 if packet.family == 4 else GSO_TCPV6) | GSO_ECN
        assert cut_packets(packet, 1_000, gso_type=kind) == cut_packets(packet, 1_000)

    def test_options_acknowledgement_window_and_reserved_bits_are_each_segments(self) -> None:
        timestamps = bytes([1, 1, 8, 10]) + bytes(range(8))
        packet = TCP4.but(
            tcp_options=timestamps, acknowledgement=0xDEADBEEF, window=77, urgent=5, reserved_bits=1
        )
        for segment in cut_packets(packet, 1_000):
            header = segment[20:52]
            assert header[20:] == timestamps
            assert struct.unpack("!8xIBxH2xH12x", header) == (0xDEADBEEF, 0x81, 77, 5)


class TestUdp:
    @pytest.mark.parametrize("packet", [UDP4, UDP6], ids=["IPv4", "IPv6"])
    def test_each_datagram_has_its_length(self, packet: Packet) -> None:
        at = packet.ip_header_length
        lengths = [int.from_bytes(one[at + 4 : at + 6], "big") for one in cut_packets(packet, 1_000)]
        assert lengths == [1_008, 1_008, 1_008, 80]

    @pytest.mark.parametrize("packet", [UDP4, UDP6], ids=["IPv4", "IPv6"])
    def test_a_checksum_that_comes_out_as_zero_is_sent_as_all_ones(self, packet: Packet) -> None:
        """RFC 768. The second datagram's payload is chosen so that its sum is that."""
        plain = packet.but(payload=bytes(100)).frame()
        check = plain[14 + packet.ip_header_length + 6 :][:2]
        zero_summed = packet.but(payload=bytes(range(100)) + check + bytes(98) + b"!")
        segments = cut_packets(zero_summed, 100)
        assert [segment[packet.ip_header_length + 6 :][:2] for segment in segments][1] == b"\xff\xff"
        assert all(transport_is_valid(segment) for segment in segments)


class TestTcpSendsZero:
    @pytest.mark.parametrize("packet", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    def test_a_tcp_checksum_of_zero_stays_zero(self, packet: Packet) -> None:
        packet = packet.but(flags=ACK)
        check = packet.but(payload=bytes(100)).frame()[14 + packet.ip_header_length + 16 :][:2]
        (segment,) = cut_packets(packet.but(payload=check + bytes(98)), 100)
        assert segment[packet.ip_header_length + 16 :][:2] == b"\0\0"
        assert transport_is_valid(segment)


def patched(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


class TestRefusals:
    """A header and a frame that do not agree: nothing is guessed, nothing is read that is not there."""

    @pytest.mark.parametrize(
        ("packet", "header"),
        [
            pytest.param(TCP4, {"gso_size": 0}, id="no size"),
            pytest.param(TCP4, {"flags": 0}, id="NEEDS_CSUM is not set"),
            pytest.param(TCP4, {"flags": 2}, id="DATA_VALID in its place"),
            pytest.param(TCP4, {"gso_type": 0}, id="no superframe at all"),
            pytest.param(TCP4, {"gso_type": 2}, id="a type there is not"),
            pytest.param(UDP4, {"gso_type": 3}, id="UFO: IP fragments, a feature of old"),
            pytest.param(TCP4, {"gso_type": GSO_TCPV6}, id="TCPV6 of IPv4"),
            pytest.param(TCP6, {"gso_type": GSO_TCPV4}, id="TCPV4 of IPv6"),
            pytest.param(TCP4, {"gso_type": GSO_UDP_L4, "checksum_offset": 6}, id="UDP_L4 of TCP over IPv4"),
            pytest.param(TCP6, {"gso_type": GSO_UDP_L4, "checksum_offset": 6}, id="UDP_L4 of TCP over IPv6"),
            pytest.param(UDP4, {"gso_type": GSO_TCPV4, "checksum_offset": 16}, id="TCPV4 of UDP"),
            pytest.param(UDP6, {"gso_type": GSO_TCPV6, "checksum_offset": 16}, id="TCPV6 of UDP"),
            pytest.param(TCP4, {"checksum_offset": 6}, id="UDP's checksum offset in TCP"),
            pytest.param(UDP4, {"checksum_offset": 16}, id="TCP's checksum offset in UDP"),
            pytest.param(TCP4, {"checksum_offset": 0xFFFF}, id="a checksum offset far away"),
            *(
                pytest.param(packet, {"checksum_start": start}, id=f"{name}: checksum from byte {start}")
                for packet, name in zip(EVERY, EVERY_ID, strict=True)
                for start in (0, 13, 14, 33, 0xFFFF)
            ),
            pytest.param(TCP4, {"checksum_start": 35}, id="a transport header one byte late over IPv4"),
            pytest.param(TCP4, {"checksum_start": 38}, id="IPv4 options that are not there"),
            pytest.param(TCP6, {"checksum_start": 53}, id="a transport header within IPv6's"),
            pytest.param(
                TCP6,
                {"checksum_start": 14 + 40 + 20 + len(PAYLOAD) - 19},
                id="room for 19 bytes of TCP header",
            ),
            pytest.param(
                UDP6, {"checksum_start": 14 + 40 + 8 + len(PAYLOAD) - 7}, id="room for 7 bytes of UDP header"
            ),
        ],
    )
    def test_a_header_that_lies(self, packet: Packet, header: dict[str, int]) -> None:
        virtio, frame = packet.superframe(1_000, **header)
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_headers_without_payload(self, packet: Packet) -> None:
        virtio, frame = packet.but(payload=b"").superframe(1_000)
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", [TCP4, UDP4], ids=["TCP", "UDP"])
    @pytest.mark.parametrize(
        "fragment", [b"\x20\x00", b"\x00\x01", b"\x20\xb9"], ids=["first", "last", "middle"]
    )
    def test_fragments_over_ipv4(self, packet: Packet, fragment: bytes) -> None:
        virtio, frame = packet.superframe(1_000)
        frame = patched(frame, 20, fragment)
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", [TCP6, UDP6], ids=["TCP", "UDP"])
    def test_fragments_over_ipv6(self, packet: Packet) -> None:
        virtio, frame = packet.but(extensions=(44,)).superframe(1_000)
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    @pytest.mark.parametrize("words", [0, 1, 4], ids=["none", "one word", "four words"])
    def test_a_tcp_header_shorter_than_tcp_has(self, packet: Packet, words: int) -> None:
        virtio, frame = packet.superframe(1_000)
        frame = patched(frame, 14 + packet.ip_header_length + 12, bytes([words << 4]))
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", [TCP4, TCP6], ids=["IPv4", "IPv6"])
    def test_a_tcp_header_longer_than_the_packet(self, packet: Packet) -> None:
        virtio, frame = packet.but(payload=bytes(39)).superframe(10)
        frame = patched(frame, 14 + packet.ip_header_length + 12, b"\xf0")
        assert cut(virtio, frame) == DropReason.VIRTIO_HEADER
        assert oracle.cut(virtio, frame) == "VIRTIO_HEADER"

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_a_superframe_cut_short_at_every_byte_of_its_headers(self, packet: Packet) -> None:
        """The IP header tells the packet's length: where less came, the frame is no IP packet."""
        virtio, frame = packet.superframe(1_000)
        for length in range(14 + packet.headers_length + 1):
            answer = cut(virtio, frame[:length])
            assert answer == (DropReason.FRAME_SHORT if length < 14 else DropReason.IP_MALFORMED)
            assert isinstance(answer, DropReason)
            assert oracle.cut(virtio, frame[:length]) == answer.name

    @pytest.mark.parametrize("packet", EVERY, ids=EVERY_ID)
    def test_a_packet_that_says_it_is_short_at_every_byte_of_its_headers(self, packet: Packet) -> None:
        virtio, frame = packet.superframe(1_000)
        for length in range(packet.ip_header_length, packet.headers_length + 1):
            told = struct.pack("!H", length - (40 if packet.family == 6 else 0))
            short = patched(frame, 14 + (4 if packet.family == 6 else 2), told)
            assert cut(virtio, short) == DropReason.VIRTIO_HEADER
            assert oracle.cut(virtio, short) == "VIRTIO_HEADER"

    def test_what_is_no_ip_packet_is_refused_as_that(self) -> None:
        virtio, frame = TCP4.superframe(1_000)
        assert cut(virtio, frame[:12] + b"\x08\x06" + frame[14:]) == DropReason.FRAME_NOT_IP
        assert cut(virtio, patched(frame, 22, b"\0")) == DropReason.IP_TTL_EXPIRED

    def test_ping_is_no_superframe(self) -> None:
        virtio, _ = TCP6.superframe(1_000)
        ping = build.frame(
            build.ping("fd00:1::2", "fd00:2::2", PAYLOAD), destination=bytes(6), source=bytes(6)
        )
        assert cut(virtio, ping) == DropReason.VIRTIO_HEADER

    def test_a_header_of_nine_bytes_is_the_callers_mistake(self) -> None:
        with pytest.raises(ValueError, match="header"):
            cut(bytes(9), TCP4.partial())
