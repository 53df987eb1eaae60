"""RFC 7348 sections 4 and 5 as named cases, in both modes of the reserved bits."""

import pytest

from fastpath.drops import DropReason
from fastpath.wire import vxlan
from tests.packets import build
from tests.reference import vxlan as oracle

VNI = 0x123456
FRAME = bytes(range(64))

# name: (datagram, strict answer, RFC answer)
CASES: dict[str, tuple[bytes, tuple[int, int] | DropReason, tuple[int, int] | DropReason]] = {
    "flags I only": (build.vxlan(VNI), (VNI, 8), (VNI, 8)),
    "VNI 0": (build.vxlan(0), (0, 8), (0, 8)),
    "the largest VNI": (build.vxlan(0xFFFFFF), (0xFFFFFF, 8), (0xFFFFFF, 8)),
    "I clear": (build.vxlan(VNI, flags=0), DropReason.TUNNEL_FLAGS, DropReason.TUNNEL_FLAGS),
    "all flags but I": (build.vxlan(VNI, flags=0xF7), DropReason.TUNNEL_FLAGS, DropReason.TUNNEL_FLAGS),
    "a reserved flag beside I": (build.vxlan(VNI, flags=0x88), DropReason.TUNNEL_FLAGS, (VNI, 8)),
    "GPE's P bit": (build.vxlan(VNI, flags=0x0C), DropReason.TUNNEL_FLAGS, (VNI, 8)),
    "all flags": (build.vxlan(VNI, flags=0xFF), DropReason.TUNNEL_FLAGS, (VNI, 8)),
    "first reserved field": (
        build.vxlan(VNI, reserved=b"\0\0\1"),
        DropReason.TUNNEL_FLAGS,
        (VNI, 8),
    ),
    "group policy extension": (
        build.vxlan(VNI, flags=0x88, reserved=b"\0\0\7"),
        DropReason.TUNNEL_FLAGS,
        (VNI, 8),
    ),
    "second reserved field": (build.vxlan(VNI, reserved_byte=1), DropReason.TUNNEL_FLAGS, (VNI, 8)),
    "remote checksum offload": (
        build.vxlan(VNI, flags=0x28, reserved_byte=0x91),
        DropReason.TUNNEL_FLAGS,
        (VNI, 8),
    ),
    "nothing": (b"", DropReason.TUNNEL_SHORT, DropReason.TUNNEL_SHORT),
}


@pytest.mark.parametrize(("datagram", "strict", "lenient"), CASES.values(), ids=CASES)
def test_decode(
    datagram: bytes, strict: tuple[int, int] | DropReason, lenient: tuple[int, int] | DropReason
) -> None:
    behind = FRAME if datagram else b""
    assert vxlan.decode(datagram + behind, strict=True) == strict
    assert vxlan.decode(datagram + behind, strict=False) == lenient
    assert vxlan.decode(datagram + behind) == strict, "strict is the default"


def test_a_header_cut_at_any_byte_is_short() -> None:
    for length in range(8):
        for strict in (True, False):
            assert vxlan.decode(build.vxlan(VNI)[:length], strict=strict) is DropReason.TUNNEL_SHORT


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "rfc"])
def test_every_value_of_every_byte(strict: bool) -> None:
    for at in range(8):
        for value in range(256):
            header = bytearray(build.vxlan(VNI))
            header[at] = value
            datagram = bytes(header)
            fault, answer = oracle.fault(datagram, strict=strict), vxlan.decode(datagram, strict=strict)
            expected = oracle.decode(datagram) if fault is None else DropReason[fault]
            assert answer == expected, (at, value)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "rfc"])
def test_every_value_of_the_first_two_bytes(strict: bool) -> None:
    rest = build.vxlan(VNI)[2:]
    for first in range(256):
        for second in range(256):
            datagram = bytes([first, second]) + rest
            fault = oracle.fault(datagram, strict=strict)
            expected = oracle.decode(datagram) if fault is None else DropReason[fault]
            assert vxlan.decode(datagram, strict=strict) == expected, (first, second)


@pytest.mark.parametrize("vni", [0, 1, VNI, 0xFFFFFF])
def test_encode_sets_no_bit_but_i_and_vni(vni: int) -> None:
    assert vxlan.encode(vni) == b"\x08\0\0\0" + vni.to_bytes(3, "big") + b"\0"
    assert vxlan.decode(vxlan.encode(vni)) == (vni, 8)


@pytest.mark.parametrize("vni", [-1, 1 << 24, 1 << 40])
def test_encode_refuses_a_vni_that_is_not_24_bits(vni: int) -> None:
    with pytest.raises(ValueError, match=str(vni)):
        vxlan.encode(vni)
