from hypothesis import given
from hypothesis import strategies as st

from fastpath.drops import DropReason
from fastpath.offload.virtio import VirtioHeader, complete_checksum, decode, encode
from tests.packets import build
from tests.reference.checksum import transport_is_valid

BYTE, HALF = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
HEADER = st.builds(VirtioHeader, BYTE, BYTE, HALF, HALF, HALF, HALF)


@given(HEADER)
def test_round_trip(header: VirtioHeader) -> None:
    assert decode(encode(header)) == header
    assert len(encode(header)) == 10


@given(st.binary(min_size=10, max_size=12))
def test_round_trip_of_bytes(data: bytes) -> None:
    assert encode(decode(data)) == data[:10]


@given(
    st.sampled_from([("10.1.0.1", "10.2.0.1"), ("fd00:1::1", "fd00:2::1")]),
    st.sampled_from([build.udp, build.tcp]),
    st.binary(max_size=600),
    HALF,
    HALF,
    st.tuples(HALF, HALF),
)
def test_complete_checksum_equals_scapys(
    pair: tuple[str, str], make: object, payload: bytes, sport: int, dport: int, untrusted: tuple[int, int]
) -> None:
    packet = (build.udp if make is build.udp else build.tcp)(*pair, payload, sport=sport, dport=dport)
    unfinished, start, offset = build.leave_checksum_partial(packet)
    macs = bytes(range(12))
    frame = build.frame(unfinished, destination=macs[:6], source=macs[6:])
    # header_length and gso_size say nothing that may be relied on.
    header = VirtioHeader(build.NEEDS_CHECKSUM, 0, *untrusted, 14 + start, offset)
    finished = complete_checksum(header, frame)
    assert finished == frame[:14] + packet
    assert transport_is_valid(packet)


@given(HEADER, st.binary(max_size=200))
def test_any_header_on_any_frame_changes_its_field_or_is_refused(header: VirtioHeader, frame: bytes) -> None:
    finished = complete_checksum(header, frame)
    field = header.checksum_start + header.checksum_offset
    fits = header.checksum_start >= 14 and field + 2 <= len(frame)
    if not header.flags & build.NEEDS_CHECKSUM:
        assert finished == frame
    elif fits:
        assert isinstance(finished, bytes)
        assert finished[:field] + finished[field + 2 :] == frame[:field] + frame[field + 2 :]
    else:
        assert finished is DropReason.VIRTIO_HEADER
