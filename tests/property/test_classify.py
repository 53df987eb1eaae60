import socket
from collections.abc import Callable

from hypothesis import assume, given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from fastpath.drops import DropReason
from fastpath.wire.classify import FrameInfo, classify
from tests.packets import build
from tests.reference import classify as oracle


def framed(packet: bytes, padding: bytes = b"") -> bytes:
    return build.frame(packet, destination=bytes(6), source=bytes(6), padding=padding)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """UDP or TCP packets with every field that classify reads drawn at random."""
    family = draw(st.sampled_from([socket.AF_INET, socket.AF_INET6]))
    size = 4 if family == socket.AF_INET else 16
    source, destination = (
        socket.inet_ntop(family, draw(st.binary(min_size=size, max_size=size))) for _ in range(2)
    )
    make: Callable[..., bytes] = draw(st.sampled_from([build.udp, build.tcp]))
    fragment = {"flags": draw(st.integers(0, 7)), "frag": draw(st.sampled_from([0, 0, 1, 185, 0x1FFF]))}
    return make(
        source,
        destination,
        draw(st.binary(max_size=40)),
        sport=draw(st.integers(0, 0xFFFF)),
        dport=draw(st.integers(0, 0xFFFF)),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(1, 255)),
        **(fragment if family == socket.AF_INET else {"fl": draw(st.integers(0, 0xFFFFF))}),
    )


def assert_agrees(frame: bytes) -> None:
    answer, expected = classify(frame), oracle.classify(frame)
    if isinstance(expected, str):
        assert answer is DropReason[expected]
    else:
        assert isinstance(answer, FrameInfo)
        assert answer[:6] == expected[:6]


@given(packets(), st.binary(max_size=20))
def test_fields_equal_what_scapy_dissects(packet: bytes, padding: bytes) -> None:
    frame = framed(packet, padding)
    answer, dissected = classify(frame), Ether(frame)
    assert isinstance(answer, FrameInfo)
    if IP in dissected:
        ip = dissected[IP]
        fragment = bool(ip.flags.MF) or ip.frag != 0
        assert answer[:6] == (4, ip.len, ip.ihl * 4, ip.proto, ip.tos, fragment)
    else:
        ip = dissected[IPv6]
        assert answer[:6] == (6, 40 + ip.plen, 40, ip.nh, ip.tc, False)


@given(packets(), st.data())
def test_a_mutated_frame_is_read_as_the_oracle_reads_it(packet: bytes, data: st.DataObject) -> None:
    frame = bytearray(framed(packet))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert_agrees(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    assert_agrees(bytes(frame))


@given(
    st.binary(max_size=120)
    | st.builds(
        lambda kind, first, rest: bytes(12) + kind + bytes([first]) + rest,
        st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8", b"\x08\x06"]),
        st.sampled_from([0x45, 0x46, 0x4F, 0x60]) | st.integers(0, 255),
        st.binary(max_size=100),
    )
)
def test_garbage_is_read_as_the_oracle_reads_it(frame: bytes) -> None:
    assert_agrees(frame)


def flow_of(frame: bytes) -> tuple[bytes, bytes, int, bytes]:
    fields = oracle.classify(frame)
    assert isinstance(fields, oracle.Fields)
    return fields.flow


@given(packets(), st.data())
def test_the_flow_hash_depends_on_the_flow_and_nothing_else(packet: bytes, data: st.DataObject) -> None:
    frame = framed(packet)
    mutated = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(12, len(frame) - 1))] = data.draw(st.integers(0, 255))
    before, after = classify(frame), classify(bytes(mutated))
    assume(isinstance(before, FrameInfo) and isinstance(after, FrameInfo))
    assert isinstance(before, FrameInfo)
    assert isinstance(after, FrameInfo)
    # 32 bits: an accidental collision of two drawn flows is not to be expected in a lifetime of runs.
    assert (before.flow_hash == after.flow_hash) == (flow_of(frame) == flow_of(bytes(mutated)))
