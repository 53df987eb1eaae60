"""Cutting and merging: equal to the oracles, each the other's inverse, nothing lost, made up or overtaken."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpath.drops import DropReason
from fastpath.offload.coalesce import merge
from fastpath.offload.segment import cut
from fastpath.wire.classify import FrameInfo, classify
from tests.packets.transport import ACK, CWR, DESTINATION_OPTIONS, ECE, FIN, PSH, TCP, UDP, VIRTIO, Packet
from tests.reference import checksum
from tests.reference import coalesce as merge_oracle
from tests.reference import segment as cut_oracle
from tests.reference.classify import Fields
from tests.reference.classify import classify as classify_oracle

BYTE, SHORT, WORD = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
ENDS = st.sampled_from([("10.2.0.2", "10.1.0.2"), ("fd00:2::2", "fd00:1::2")])
NOTHING_ASKED = bytes(10)


def payload(length: int) -> bytes:
    return (b"a superframe's payload, odd in length" * (length // 37 + 1))[:length]


def packets(flags: st.SearchStrategy[int], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Packet]:
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "protocol": st.sampled_from([TCP, UDP]),
        "tos": BYTE,
        "ttl": st.integers(1, 255),
        "flow_label": st.integers(0, 0xFFFFF),
        "identification": SHORT,
        "dont_fragment": st.booleans(),
        "source_port": SHORT,
        "destination_port": SHORT,
        "sequence": WORD,
        "acknowledgement": WORD,
        "flags": flags,
        "reserved_bits": st.integers(0, 15),
        "window": SHORT,
        "urgent": SHORT,
        "tcp_options": st.integers(0, 10).flatmap(
            lambda words: st.binary(min_size=4 * words, max_size=4 * words)
        ),
        "payload": (st.integers(1, 300) | st.integers(1, 65_000)).map(payload),
    }
    return st.builds(lambda ends, **chosen: Packet(*ends, **chosen), ENDS, **(drawn | fields))


WITH_EXTRAS = packets(
    BYTE,
    ip_options=st.integers(0, 10).map(lambda words: b"\1" * 4 * words),
    extensions=st.lists(st.sampled_from([0, 43, DESTINATION_OPTIONS]), max_size=3).map(tuple),
    padding=st.binary(max_size=9),
)
MERGEABLE = packets(st.sampled_from([ACK, ACK | PSH, ACK | ECE, ACK | ECE | PSH]))
SIZE = st.integers(1, 300) | st.integers(1, 0xFFFF)


class TestCut:
    @given(WITH_EXTRAS, SIZE)
    def test_equals_the_oracle(self, packet: Packet, size: int) -> None:
        size = max(size, len(packet.payload) // 300 + 1)  # the oracle takes its time
        virtio, frame = packet.superframe(size)
        assert answer(virtio, frame) == cut_oracle.cut(virtio, frame)

    @given(WITH_EXTRAS, st.integers(1, 0xFFFF))
    def test_no_byte_of_the_payload_is_lost_or_made_up(self, packet: Packet, size: int) -> None:
        segments = cut(*packet.superframe(size))
        assert isinstance(segments, list)
        header = 14 + packet.headers_length
        assert b"".join(segment[header:] for segment in segments) == packet.payload
        assert len(segments) == -(-len(packet.payload) // size)

    @given(
        packets(BYTE, payload=st.integers(0, 300).map(payload)),
        st.fixed_dictionaries(
            {},
            optional={
                "flags": BYTE,
                "gso_type": st.sampled_from([0, 1, 2, 3, 4, 5, 0x81, 0x84, 0x85]) | BYTE,
                "header_length": SHORT,
                "gso_size": st.integers(0, 3) | SHORT,
                "checksum_start": st.integers(0, 120) | SHORT,
                "checksum_offset": st.sampled_from([6, 16]) | SHORT,
            },
        ),
    )
    def test_what_is_refused(self, packet: Packet, lies: dict[str, int]) -> None:
        virtio, frame = packet.superframe(100, **lies)
        said, expected = answer(virtio, frame), cut_oracle.cut(virtio, frame)
        if lies.get("checksum_start", 14 + packet.ip_header_length) == 14 + packet.ip_header_length:
            assert said == expected
        else:  # over IPv6 it may be taken on trust; then there is no sum to be right about
            assert isinstance(said, str) == isinstance(expected, str)

    @given(WITH_EXTRAS, st.binary(max_size=10), st.data())
    def test_garbage_is_refused_or_cut_within_its_bounds(
        self, packet: Packet, junk: bytes, data: st.DataObject
    ) -> None:
        virtio, frame = packet.superframe(data.draw(st.integers(50, 0xFFFF)))
        at = data.draw(st.integers(14, 14 + packet.headers_length))
        frame = (frame[:at] + junk + frame[at + len(junk) :])[: data.draw(st.integers(0, len(frame)))]
        said, expected = answer(virtio, frame), cut_oracle.cut(virtio, frame)
        if isinstance(expected, str):
            assert said == expected
        else:
            assert isinstance(said, list)
            assert [len(segment) for segment in said] == [len(segment) for segment in expected]


def answer(virtio: bytes, frame: bytes) -> list[bytes] | str:
    said = cut(virtio, frame)
    return said.name if isinstance(said, DropReason) else said


class TestBothWays:
    @given(MERGEABLE, SIZE)
    def test_what_is_cut_merges_to_what_it_was(self, packet: Packet, size: int) -> None:
        size = max(size, -(-len(packet.payload) // 64))
        segments = cut(*packet.superframe(size))
        assert isinstance(segments, list)
        if len(segments) == 1:
            assert merge(segments) == [(NOTHING_ASKED, packet.frame())]
        else:
            assert merge(segments) == [packet.superframe(size)]

    @given(MERGEABLE, st.integers(1, 100))
    def test_what_is_longer_than_a_chain_is_cut_in_chains(self, packet: Packet, size: int) -> None:
        packet = packet.but(payload=packet.payload[: 300 * size])
        segments = cut(*packet.superframe(size))
        assert isinstance(segments, list)
        again = [piece for virtio, frame in merge(segments) for piece in apart(virtio, frame)]
        assert again == segments


def apart(virtio: bytes, frame: bytes) -> list[bytes]:
    """The packets a stack would make of what is written to its TAP."""
    if VIRTIO.unpack(virtio)[1] == 0:
        return [frame]
    segments = cut(virtio, frame)
    assert isinstance(segments, list)
    return segments


# Batches of several flows ------------------------------------------------------------------------------


def flows() -> list[Packet]:
    """Eight flows that share no bucket of the coalescer, so that the oracle needs none."""
    chosen: dict[int, Packet] = {}
    for port in range(50):
        for ends in (("10.2.0.2", "10.1.0.2"), ("fd00:2::2", "fd00:1::2")):
            for protocol in (TCP, UDP):
                packet = Packet(*ends, protocol=protocol, source_port=port, payload=b"x")
                info = classify(packet.frame())
                assert isinstance(info, FrameInfo)
                if len(chosen) < 8:
                    chosen.setdefault(info.flow_hash % 256, packet)
    return list(chosen.values())


FLOWS = flows()

CHANGES: list[dict[str, Any]] = [
    {"ttl": 3},
    {"tos": 2},
    {"tos": 3},
    {"flow_label": 9},
    {"dont_fragment": False},
    {"identification": 9},
    {"acknowledgement": 8},
    {"window": 9},
    {"urgent": 1},
    {"reserved_bits": 1},
    {"tcp_options": b"\1\1\1\1"},
    {"sequence": 9},
    {"flags": ACK | PSH},
    {"flags": ACK | FIN},
    {"flags": ACK | ECE},
    {"flags": ACK | CWR},
    {"more_fragments": True},
    {"extensions": (44,)},
    {"extensions": (DESTINATION_OPTIONS,)},
    {"ip_options": b"\1\1\1\1"},
]

FORMS = ["right"] * 8 + ["partial", "padded", "corrupt", "wrong IPv4 checksum", "no checksum"]

# (flow, payload bytes, what changes, what becomes of it on the way)
Step = tuple[int, int, dict[str, Any], str]
STEP = st.tuples(
    st.integers(0, len(FLOWS) - 1) | st.just(0),
    st.sampled_from([100] * 6 + [99, 1, 101, 0]),
    st.just({}) | st.sampled_from(CHANGES),
    st.sampled_from(FORMS),
)
BATCH = st.lists(st.tuples(STEP, st.sampled_from([1, 1, 1, 2, 3, 9, 70])), max_size=16).map(
    lambda bursts: [step for step, times in bursts for _ in range(times)]
)


def frames_of(steps: list[Step]) -> list[bytes]:
    """What the flows' senders send, and what becomes of it on the way."""
    state = list(FLOWS)
    frames = []
    for flow, length, change, form in steps:
        packet = state[flow].followed_by(payload(length), **change)
        transient = {"flags": ACK, "more_fragments": False, "extensions": (), "ip_options": b""}
        state[flow] = packet.but(**transient)
        frames.append(formed(packet, form))
    return frames


def formed(packet: Packet, form: str) -> bytes:
    frame = packet.but(padding=b"\xaa" * 7).frame() if form == "padded" else packet.frame()
    if form == "partial":
        frame = packet.partial()
    elif form == "corrupt":
        frame = frame[:-1] + bytes([frame[-1] ^ 0x40])
    elif form == "wrong IPv4 checksum" and packet.family == 4:
        frame = frame[:24] + bytes([frame[24] ^ 0x40]) + frame[25:]
    elif form == "no checksum" and packet.protocol == UDP:
        at = 14 + packet.ip_header_length + 6
        frame = frame[:at] + b"\0\0" + frame[at + 2 :]
    return frame


def unpadded(frame: bytes) -> bytes:
    return frame[: 14 + fields_of(frame).packet_length]


def fields_of(frame: bytes) -> Fields:
    fields = classify_oracle(frame)
    assert isinstance(fields, Fields)
    return fields


def without_meaningless_identification(frame: bytes) -> bytes:
    """RFC 6864 section 4.1: the ID of a packet that may not be fragmented says nothing."""
    if fields_of(frame).family == 6 or not frame[20] & 0x40:
        return frame
    return frame[:18] + frame[20:24] + frame[26:]


class TestMerge:
    @given(BATCH, st.booleans(), st.booleans())
    @settings(max_examples=300)
    def test_equals_the_oracle(self, steps: list[Step], tcp: bool, udp: bool) -> None:
        frames = frames_of(steps)
        assert merge(frames, tcp=tcp, udp=udp) == merge_oracle.merge(frames, tcp=tcp, udp=udp)

    @given(BATCH)
    @example([(0, 100, {}, "right")] * 70)
    @settings(max_examples=300)
    def test_nothing_is_lost_made_up_or_overtaken(self, steps: list[Step]) -> None:
        """Cut again, what was written is what came: of each flow in its order, checksums and all."""
        came = frames_of(steps)
        partial = {unpadded(frame) for frame in came if completed(frame) != frame}
        by_flow: dict[object, list[bytes]] = defaultdict(list)
        for frame in came:
            by_flow[fields_of(frame).flow].append(
                without_meaningless_identification(completed(unpadded(frame)))
            )
        written: dict[object, list[bytes]] = defaultdict(list)
        for virtio, frame in merge(came):
            for piece in apart(virtio, frame):
                marked = VIRTIO.unpack(virtio)[:2] == (1, 0)
                assert marked == (piece in partial), "marked if partial, and only then"
                whole = completed(piece) if marked else piece
                written[fields_of(piece).flow].append(without_meaningless_identification(whole))
        assert written == by_flow

    @given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2)), max_size=300))
    def test_order_holds_among_more_flows_than_chains_and_buckets(self, steps: list[tuple[int, int]]) -> None:
        state: dict[int, Packet] = {}
        frames = []
        for port, kind in steps:
            base = state.get(port, FLOWS[0].but(source_port=port, payload=b""))
            state[port] = base.followed_by(payload(10 + kind // 2))
            frames.append(state[port].frame())
        pieces = [piece for one in merge(frames) for piece in apart(*one)]
        assert ports_and_sequences(pieces) == ports_and_sequences(frames)


def completed(frame: bytes) -> bytes:
    """The frame with its checksum finished if it is partial."""
    packet = merge_oracle.read(frame)
    if not packet.checksum_is_partial:
        return frame
    start, offset = 14 + packet.fields.header_length, 6 if packet.fields.protocol == UDP else 16
    value = checksum.checksum(unpadded(frame)[start:])
    if value == 0 and packet.fields.protocol == UDP:
        value = 0xFFFF  # RFC 768
    at = start + offset
    return frame[:at] + value.to_bytes(2, "big") + frame[at + 2 :]


def ports_and_sequences(frames: list[bytes]) -> dict[bytes, list[bytes]]:
    seen: dict[bytes, list[bytes]] = defaultdict(list)
    for frame in frames:
        seen[frame[34:36]].append(frame[38:42])
    return seen
