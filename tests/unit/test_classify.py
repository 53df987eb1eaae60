import pytest

from fastpath.drops import DropReason
from fastpath.wire.classify import FrameInfo, classify, ecn_decapsulate
from tests.packets import build
from tests.reference import ecn

ROUTER = build.mac("02:00:00:00:00:01")
HOST = build.mac("02:00:00:00:00:02")

V4 = ("10.1.0.1", "10.2.0.1")
V6 = ("fd00:1::1", "fd00:2::1")


def framed(packet: bytes, **options: int | bytes) -> bytes:
    return build.frame(packet, destination=ROUTER, source=HOST, **options)  # type: ignore[arg-type]


def patched(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


UDP4, UDP6 = build.udp(*V4), build.udp(*V6)

REFUSED = {
    "nothing": (b"", DropReason.FRAME_SHORT),
    "one byte less than an Ethernet header": (framed(UDP4)[:13], DropReason.FRAME_SHORT),
    "an Ethernet header and no packet": (framed(UDP4)[:14], DropReason.IP_MALFORMED),
    "802.1Q tag": (framed(UDP4, ethertype=build.ETHERTYPE_VLAN), DropReason.FRAME_VLAN),
    "802.1Q tag and nothing behind": (
        framed(UDP4, ethertype=build.ETHERTYPE_VLAN)[:14],
        DropReason.FRAME_VLAN,
    ),
    "802.1ad tag": (framed(UDP4, ethertype=build.ETHERTYPE_QINQ), DropReason.FRAME_VLAN),
    "ARP": (framed(b"\0\1\x08\0\6\4\0\1" + bytes(20), ethertype=0x0806), DropReason.FRAME_NOT_IP),
    "LLDP": (framed(bytes(46), ethertype=0x88CC), DropReason.FRAME_NOT_IP),
    "802.3 length instead of a type (STP)": (framed(bytes(38), ethertype=38), DropReason.FRAME_NOT_IP),
    "IPv6 under IPv4's type": (framed(UDP6, ethertype=build.ETHERTYPE_IPV4), DropReason.IP_MALFORMED),
    "IPv4 under IPv6's type": (framed(UDP4, ethertype=build.ETHERTYPE_IPV6), DropReason.IP_MALFORMED),
    "version 0": (framed(patched(UDP4, 0, b"\x05"), ethertype=0x0800), DropReason.IP_MALFORMED),
    "IHL 4": (framed(patched(UDP4, 0, b"\x44")), DropReason.IP_MALFORMED),
    "IHL 0": (framed(patched(UDP4, 0, b"\x40")), DropReason.IP_MALFORMED),
    "IHL beyond the total length": (
        framed(patched(patched(UDP4, 0, b"\x4f"), 2, b"\0\x3b")),
        DropReason.IP_MALFORMED,
    ),
    "total length below the header's": (framed(patched(UDP4, 2, b"\0\x13")), DropReason.IP_MALFORMED),
    "total length zero": (framed(patched(UDP4, 2, b"\0\0")), DropReason.IP_MALFORMED),
    "total length beyond the frame": (framed(UDP4)[:-1], DropReason.IP_MALFORMED),
    "payload length beyond the frame": (framed(UDP6)[:-1], DropReason.IP_MALFORMED),
    "payload length all ones": (framed(patched(UDP6, 4, b"\xff\xff")), DropReason.IP_MALFORMED),
    "TTL 0": (framed(build.udp(*V4, ttl=0)), DropReason.IP_TTL_EXPIRED),
    "hop limit 0": (framed(build.udp(*V6, ttl=0)), DropReason.IP_TTL_EXPIRED),
}


@pytest.mark.parametrize(("frame", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(frame: bytes, reason: DropReason) -> None:
    assert classify(frame) is reason


def info(frame: bytes) -> FrameInfo:
    answer = classify(frame)
    assert isinstance(answer, FrameInfo), answer
    return answer


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        pytest.param(build.udp(*V4, b"x" * 10), (4, 38, 20, 17, 0, False), id="UDP over IPv4"),
        pytest.param(build.udp(*V6, b"x" * 10), (6, 58, 40, 17, 0, False), id="UDP over IPv6"),
        pytest.param(build.tcp(*V4, b""), (4, 40, 20, 6, 0, False), id="TCP over IPv4"),
        pytest.param(build.tcp(*V6, b""), (6, 60, 40, 6, 0, False), id="TCP over IPv6"),
        pytest.param(build.udp(*V4, b"", tos=0xB9), (4, 28, 20, 17, 0xB9, False), id="ToS, IPv4"),
        pytest.param(build.udp(*V6, b"", tos=0xB9), (6, 48, 40, 17, 0xB9, False), id="traffic class, IPv6"),
        pytest.param(build.udp(*V4, b"", ttl=1), (4, 28, 20, 17, 0, False), id="TTL 1 is alive"),
        pytest.param(build.udp(*V6, b"", ttl=1), (6, 48, 40, 17, 0, False), id="hop limit 1 is alive"),
        pytest.param(build.udp(*V4, b"", flags="DF"), (4, 28, 20, 17, 0, False), id="DF is no fragment"),
        pytest.param(build.udp(*V4, b"", flags="evil"), (4, 28, 20, 17, 0, False), id="reserved IPv4 flag"),
        pytest.param(build.udp(*V4, b"", flags="MF"), (4, 28, 20, 17, 0, True), id="first fragment, IPv4"),
        pytest.param(build.udp(*V4, b"", frag=1), (4, 28, 20, 17, 0, True), id="offset 1, IPv4"),
        pytest.param(build.udp(*V4, b"", frag=0x1FFF), (4, 28, 20, 17, 0, True), id="largest offset"),
        pytest.param(
            build.fragments(*V6, payload_length=2_000)[0], (6, 1448, 40, 44, 0, True), id="fragment, IPv6"
        ),
        pytest.param(
            patched(build.udp(*V4, bytes(40)), 0, b"\x4f"),
            (4, 68, 60, 17, 0, False),
            id="40 bytes of options",
        ),
        pytest.param(build.ping(*V4, b""), (4, 28, 20, 1, 0, False), id="ICMP"),
        pytest.param(build.ping(*V6, b""), (6, 48, 40, 58, 0, False), id="ICMPv6"),
        pytest.param(
            build.udp(*V4)[:2] + b"\0\x14" + build.udp(*V4)[4:20], (4, 20, 20, 17, 0, False), id="bare"
        ),
        pytest.param(patched(UDP6[:40], 4, b"\0\0"), (6, 40, 40, 17, 0, False), id="bare IPv6 header"),
    ],
)
def test_fields(packet: bytes, expected: tuple[int, int, int, int, int, bool]) -> None:
    assert info(framed(packet))[:6] == expected


@pytest.mark.parametrize("packet", [UDP4, UDP6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("padding", [1, 18, 4_000])
def test_padding_is_not_part_of_the_packet(packet: bytes, padding: int) -> None:
    assert info(framed(packet, padding=b"\xaa" * padding)) == info(framed(packet))


@pytest.mark.parametrize("packet", [UDP4, UDP6], ids=["IPv4", "IPv6"])
def test_cut_at_every_byte(packet: bytes) -> None:
    whole = framed(packet)
    for length in range(len(whole)):
        expected = DropReason.FRAME_SHORT if length < 14 else DropReason.IP_MALFORMED
        assert classify(whole[:length]) is expected, length


def test_every_ethertype() -> None:
    reasons = {
        0x0800: DropReason.IP_MALFORMED,
        0x86DD: DropReason.IP_MALFORMED,
        0x8100: DropReason.FRAME_VLAN,
        0x88A8: DropReason.FRAME_VLAN,
    }
    for ethertype in range(1 << 16):
        frame = bytes(12) + ethertype.to_bytes(2, "big") + bytes(46)
        assert classify(frame) is reasons.get(ethertype, DropReason.FRAME_NOT_IP), hex(ethertype)


class TestFlowHash:
    @pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
    @pytest.mark.parametrize("transport", [build.udp, build.tcp], ids=["UDP", "TCP"])
    def test_is_one_flows_own(self, pair: tuple[str, str], transport: object) -> None:
        make = build.udp if transport is build.udp else build.tcp
        one = info(framed(make(*pair, b"first"))).flow_hash
        assert info(framed(make(*pair, b"second, longer", ttl=3, tos=0x2E))).flow_hash == one

    @pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
    def test_changes_with_each_part_of_the_five_tuple(self, pair: tuple[str, str]) -> None:
        source, destination = pair
        hashes = {
            info(framed(packet)).flow_hash
            for packet in (
                build.udp(source, destination),
                build.udp(destination, source),
                build.udp(source + "2", destination),
                build.udp(source, destination + "2"),
                build.udp(source, destination, sport=40_001),
                build.udp(source, destination, dport=5_354),
                build.udp(source, destination, sport=5_353, dport=40_000),
                build.tcp(source, destination, sport=40_000, dport=5_353),
            )
        }
        assert len(hashes) == 8

    @pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
    def test_fragments_of_one_datagram_share_it(self, pair: tuple[str, str]) -> None:
        pieces = build.fragments(*pair, payload_length=5_000)
        assert len(pieces) > 2
        assert len({info(framed(piece)).flow_hash for piece in pieces}) == 1

    @pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
    def test_spreads_over_every_bit(self, pair: tuple[str, str]) -> None:
        hashes = [info(framed(build.udp(*pair, b"", sport=port))).flow_hash for port in range(1_000, 2_024)]
        assert len(set(hashes)) > 1_020
        for bit in range(32):
            ones = sum(value >> bit & 1 for value in hashes)
            assert 400 < ones < 624, f"bit {bit} is set in {ones} of 1024"  # seven sigma


@pytest.mark.parametrize(("inner", "outer"), ecn.DECAPSULATED, ids=lambda field: ecn.NAMES[field])
def test_ecn_decapsulate(inner: int, outer: int) -> None:
    assert ecn_decapsulate(inner, outer) == ecn.DECAPSULATED[inner, outer]


def test_the_ecn_table_is_whole() -> None:
    assert set(ecn.DECAPSULATED) == {(inner, outer) for inner in range(4) for outer in range(4)}
