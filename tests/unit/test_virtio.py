import pytest

from fastpath.drops import DropReason
from fastpath.offload.virtio import VirtioHeader, complete_checksum, decode, encode
from tests.packets import build
from tests.reference.checksum import transport_is_valid

V4 = ("10.1.0.1", "10.2.0.1")
V6 = ("fd00:1::1", "fd00:2::1")
MACS = bytes(12)

NOTHING = VirtioHeader(0, 0, 0, 0, 0, 0)


def partial(packet: bytes) -> tuple[VirtioHeader, bytes]:
    """A frame as the kernel hands it to a TAP that takes checksum offload."""
    unfinished, start, offset = build.leave_checksum_partial(packet)
    frame = build.frame(unfinished, destination=MACS[:6], source=MACS[6:])
    return VirtioHeader(build.NEEDS_CHECKSUM, 0, 0, 0, 14 + start, offset), frame


def test_fields_lie_as_in_linux_virtio_net_h() -> None:
    header = VirtioHeader(
        flags=1,
        gso_type=4,
        header_length=0x0102,
        gso_size=0x0304,
        checksum_start=0x0506,
        checksum_offset=0x0708,
    )
    assert encode(header) == bytes([1, 4, 2, 1, 4, 3, 6, 5, 8, 7])
    assert decode(encode(header)) == header


def test_num_buffers_behind_the_header_is_not_read() -> None:
    assert decode(encode(NOTHING) + b"\xff\xff") == NOTHING


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_short_header_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=str(length)):
        decode(bytes(length))


def test_a_frame_whose_header_asks_for_nothing_comes_back_as_it_is() -> None:
    frame = build.frame(build.udp(*V4), destination=MACS[:6], source=MACS[6:])
    assert complete_checksum(NOTHING, frame) == frame
    garbage = VirtioHeader(
        flags=0, gso_type=0, header_length=9, gso_size=9, checksum_start=9, checksum_offset=9
    )
    assert complete_checksum(garbage, frame) == frame


def test_data_valid_alone_asks_for_nothing() -> None:
    frame = build.frame(build.udp(*V4), destination=MACS[:6], source=MACS[6:])
    assert complete_checksum(VirtioHeader(2, 0, 0, 0, 34, 6), frame) == frame


@pytest.mark.parametrize("length", [0, 1, 2, 17, 1_400])
@pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("make", [build.udp, build.tcp], ids=["UDP", "TCP"])
def test_a_partial_checksum_becomes_what_scapy_computes(
    make: object, pair: tuple[str, str], length: int
) -> None:
    payload = bytes(range(256)) * 6
    packet = (build.udp if make is build.udp else build.tcp)(*pair, payload[:length])
    header, frame = partial(packet)
    assert frame[14:] != packet, "the checksum was partial"
    finished = complete_checksum(header, frame)
    assert finished == frame[:14] + packet
    assert transport_is_valid(packet)


@pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_udp_checksum_that_comes_out_as_zero_is_sent_as_all_ones(pair: tuple[str, str]) -> None:
    # RFC 768: zero would say "no checksum". Choose the payload's word so that the sum is all ones.
    probe = build.udp(*pair, b"\0\0")
    field = 26 if ":" not in pair[0] else 46
    packet = build.udp(*pair, probe[field : field + 2])
    assert packet[field : field + 2] == b"\xff\xff"
    header, frame = partial(packet)
    assert complete_checksum(header, frame) == frame[:14] + packet


REFUSED = {
    "checksum start behind the frame": (VirtioHeader(1, 0, 0, 0, 60, 6), 60),
    "checksum field half behind the frame": (VirtioHeader(1, 0, 0, 0, 53, 6), 60),
    "checksum field behind the frame": (VirtioHeader(1, 0, 0, 0, 34, 26), 60),
    "offset all ones": (VirtioHeader(1, 0, 0, 0, 34, 0xFFFF), 60),
    "start all ones": (VirtioHeader(1, 0, 0, 0, 0xFFFF, 6), 60),
    "both all ones": (VirtioHeader(1, 0, 0, 0, 0xFFFF, 0xFFFF), 60),
    "checksum start inside the Ethernet header": (VirtioHeader(1, 0, 0, 0, 13, 6), 60),
    "an empty frame": (VirtioHeader(1, 0, 0, 0, 34, 6), 0),
}


@pytest.mark.parametrize(("header", "length"), REFUSED.values(), ids=REFUSED)
def test_a_header_that_does_not_fit_its_frame(header: VirtioHeader, length: int) -> None:
    assert complete_checksum(header, bytes(length)) is DropReason.VIRTIO_HEADER


def test_the_last_place_a_checksum_fits() -> None:
    finished = complete_checksum(VirtioHeader(1, 0, 0, 0, 34, 24), bytes(60))
    assert finished == bytes(58) + b"\xff\xff"


def test_the_frame_that_was_given_is_not_written() -> None:
    header, frame = partial(build.udp(*V4))
    before = bytes(bytearray(frame))
    complete_checksum(header, frame)
    assert frame == before
