"""RFC 8926: each requirement on a receiver that knows no option, as named cases."""

import pytest

from fastpath.drops import DropReason
from fastpath.wire import geneve
from tests.packets import build
from tests.reference import geneve as oracle

VNI = 0x123456
FRAME = bytes(range(64))

PLAIN = build.geneve_option(b"\0" * 8)
EMPTY = build.geneve_option()
CRITICAL = build.geneve_option(b"\0" * 4, kind=0x80)
FULL = build.geneve_option(b"\0" * 124) + build.geneve_option(b"\0" * 120)  # 252 bytes, all there can be

ACCEPTED = {
    "no options": (build.geneve(VNI), 8),
    "VNI 0": (build.geneve(0), 8),
    "the largest VNI": (build.geneve(0xFFFFFF), 8),
    "the seven reserved bits are ignored on receipt": (build.geneve(VNI, reserved_bits=0x3F), 8),
    "the reserved byte is ignored on receipt": (build.geneve(VNI, reserved_byte=0xFF), 8),
    "one unknown option that is not critical is ignored": (build.geneve(VNI, options=PLAIN), 20),
    "an option's own reserved bits are ignored": (
        build.geneve(VNI, options=build.geneve_option(b"\0" * 4, reserved=7)),
        16,
    ),
    "a zero-length option is four bytes": (build.geneve(VNI, options=EMPTY), 12),
    "zero-length options to the last": (build.geneve(VNI, options=EMPTY * 63), 260),
    "options of different lengths": (build.geneve(VNI, options=EMPTY + PLAIN + EMPTY), 28),
    "252 bytes of options": (build.geneve(VNI, options=FULL), 260),
    "C set, options parsed and none critical": (build.geneve(VNI, critical=True, options=PLAIN), 20),
    "type 0x7f is the last that is not critical": (
        build.geneve(VNI, options=build.geneve_option(kind=0x7F)),
        12,
    ),
    "critical-looking bytes inside an option's data": (
        build.geneve(VNI, options=build.geneve_option(b"\xff" * 16)),
        28,
    ),
}

REFUSED = {
    "nothing": (b"", DropReason.TUNNEL_SHORT),
    "one byte less than a header": (build.geneve(VNI)[:7], DropReason.TUNNEL_SHORT),
    "G1 version 1": (build.geneve(VNI, version=1) + FRAME, DropReason.TUNNEL_VERSION),
    "G1 version 2": (build.geneve(VNI, version=2) + FRAME, DropReason.TUNNEL_VERSION),
    "G1 version 3": (build.geneve(VNI, version=3) + FRAME, DropReason.TUNNEL_VERSION),
    "G2 options promised, datagram ends": (build.geneve(VNI, option_words=1), DropReason.TUNNEL_OPTIONS),
    "G2 options promised, one byte missing": (
        build.geneve(VNI, options=PLAIN)[:-1],
        DropReason.TUNNEL_OPTIONS,
    ),
    "G2 252 bytes promised, none there": (build.geneve(VNI, option_words=63), DropReason.TUNNEL_OPTIONS),
    "G3 control packet": (build.geneve(VNI, oam=True) + FRAME, DropReason.TUNNEL_OAM),
    "G3 control packet with options": (
        build.geneve(VNI, oam=True, options=PLAIN) + FRAME,
        DropReason.TUNNEL_OAM,
    ),
    "G5 critical option, C set": (
        build.geneve(VNI, critical=True, options=CRITICAL) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 critical option, C forgotten": (
        build.geneve(VNI, options=CRITICAL) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 zero-length critical option": (
        build.geneve(VNI, critical=True, options=build.geneve_option(kind=0x80)) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 critical option behind one that is not": (
        build.geneve(VNI, critical=True, options=PLAIN + CRITICAL) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 critical option before one that is not": (
        build.geneve(VNI, critical=True, options=CRITICAL + PLAIN) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 OVN's class 0x0102 type 0x80": (
        build.geneve(
            VNI, critical=True, options=build.geneve_option(b"\0\1\0\2", option_class=0x0102, kind=0x80)
        ),
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G5 Cilium's DSR class 0x014b type 0x81": (
        build.geneve(VNI, options=build.geneve_option(b"\0" * 8, option_class=0x014B, kind=0x81)),
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G6 one option runs over the end": (
        build.geneve(VNI, options=build.geneve_option(b"\0" * 4, words=2)) + FRAME,
        DropReason.TUNNEL_OPTIONS,
    ),
    "G6 the longest option where four bytes are": (
        build.geneve(VNI, options=build.geneve_option(words=31)) + FRAME,
        DropReason.TUNNEL_OPTIONS,
    ),
    "G6 the second option runs over the end": (
        build.geneve(VNI, options=PLAIN + build.geneve_option(words=1)) + FRAME,
        DropReason.TUNNEL_OPTIONS,
    ),
    "G6 the header counts fewer words than its option": (
        build.geneve(VNI, option_words=2, options=PLAIN) + FRAME,
        DropReason.TUNNEL_OPTIONS,
    ),
    "G8 252 bytes of options, the last critical": (
        build.geneve(VNI, options=EMPTY * 62 + build.geneve_option(kind=0xFF)) + FRAME,
        DropReason.TUNNEL_CRITICAL_OPTION,
    ),
    "G8 252 bytes of options, the last too long": (
        build.geneve(VNI, options=EMPTY * 62 + build.geneve_option(words=1)) + FRAME,
        DropReason.TUNNEL_OPTIONS,
    ),
    "G9 IPv4 without Ethernet": (build.geneve(VNI, protocol=0x0800) + FRAME, DropReason.TUNNEL_PROTOCOL),
    "G9 IPv6 without Ethernet": (build.geneve(VNI, protocol=0x86DD) + FRAME, DropReason.TUNNEL_PROTOCOL),
    "G9 an unknown EtherType": (build.geneve(VNI, protocol=0xFFFF) + FRAME, DropReason.TUNNEL_PROTOCOL),
    "G9 protocol zero": (build.geneve(VNI, protocol=0) + FRAME, DropReason.TUNNEL_PROTOCOL),
}


@pytest.mark.parametrize("behind", [b"", FRAME], ids=["header only", "with a frame behind"])
@pytest.mark.parametrize(("header", "length"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(header: bytes, length: int, behind: bytes) -> None:
    vni = int.from_bytes(header[4:7], "big")
    assert geneve.decode(header + behind) == (vni, length)


@pytest.mark.parametrize(("datagram", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(datagram: bytes, reason: DropReason) -> None:
    assert geneve.decode(datagram) is reason


@pytest.mark.parametrize("datagram", [header for header, _ in ACCEPTED.values()], ids=ACCEPTED)
def test_an_accepted_header_cut_at_any_byte_is_refused(datagram: bytes) -> None:
    for length in range(len(datagram)):
        expected = DropReason.TUNNEL_SHORT if length < 8 else DropReason.TUNNEL_OPTIONS
        assert geneve.decode(datagram[:length]) is expected, length


def agrees_with_the_rfc(datagram: bytes) -> bool:
    """A datagram without a fault is accepted, one with faults is refused for one of them."""
    faults, answer = oracle.faults(datagram), geneve.decode(datagram)
    if not faults:
        return answer == oracle.decode(datagram)
    return isinstance(answer, DropReason) and answer.name in faults


def test_every_value_of_the_first_two_bytes_at_every_length_that_matters() -> None:
    # Behind the fixed header: zero-length options that are not critical, as many as can be promised.
    rest = (0x6558).to_bytes(2, "big") + VNI.to_bytes(3, "big") + b"\0" + EMPTY * 63
    wrong = []
    for first in range(256):
        promised = 8 + (first & 0x3F) * 4
        lengths = sorted({0, 1, 2, 7, 8, promised - 1, promised, promised + 1})
        for second in range(256):
            whole = bytes([first, second]) + rest + b"\0"
            wrong += [whole[:length] for length in lengths if not agrees_with_the_rfc(whole[:length])]
    assert not wrong


def test_every_length_against_every_option_length() -> None:
    options = build.geneve_option(words=31) + bytes(248)
    for words in range(64):
        whole = build.geneve(VNI, option_words=words, options=options)
        for length in range(len(whole) + 1):
            assert agrees_with_the_rfc(whole[:length]), (words, length)


def test_every_pair_of_option_lengths() -> None:
    for words in range(64):
        for first in range(32):
            for second in range(32):
                options = build.geneve_option(bytes(4 * first)) + build.geneve_option(words=second)
                datagram = build.geneve(VNI, option_words=words, options=options.ljust(252, b"\0"))
                assert agrees_with_the_rfc(datagram), (words, first, second)


@pytest.mark.parametrize("critical", [False, True], ids=["C=0", "C=1"])
def test_every_option_type(critical: bool) -> None:
    for kind in range(256):
        options = build.geneve_option(b"\0" * 4, kind=kind)
        assert agrees_with_the_rfc(build.geneve(VNI, critical=critical, options=options)), kind


@pytest.mark.parametrize("vni", [0, 1, VNI, 0xFFFFFF])
def test_encode_sets_no_bit_but_protocol_and_vni(vni: int) -> None:
    # G7: no option is sent, so C, O, Opt Len and all that is reserved are zero.
    assert geneve.encode(vni) == b"\0\0\x65\x58" + vni.to_bytes(3, "big") + b"\0"
    assert geneve.decode(geneve.encode(vni)) == (vni, 8)


@pytest.mark.parametrize("vni", [-1, 1 << 24, 1 << 40])
def test_encode_refuses_a_vni_that_is_not_24_bits(vni: int) -> None:
    with pytest.raises(ValueError, match=str(vni)):
        geneve.encode(vni)
