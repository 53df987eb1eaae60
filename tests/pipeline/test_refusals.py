"""The kernel refuses in the middle of a batch: each datagram leaves, and each packet arrives, once and in
order; what does not is counted, once and under its reason; an offload is given up only if it was the cause.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.packets.transport import ACK, PSH, UDP, Packet
from tests.pipeline import refused
from tests.pipeline.harness import gateway_mac, router_mac
from tests.pipeline.refused import PLAIN, WHOLE, Batch, Outcome, Refusal
from tests.reference import segment
from tests.reference.plan import plan

FROM_PODS = router_mac(1) + gateway_mac(1)
ON_THE_WIRE = router_mac(2) + router_mac(1)
FROM_PEER = router_mac(1) + router_mac(2)
TO_PODS = gateway_mac(1) + router_mac(1)
NOTHING_ASKED = bytes(10)

Encap = Callable[..., list[Outcome]]
Decap = Callable[..., list[Outcome]]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with refused.process(tmp_path_factory.mktemp("refusals")) as pool:
        yield pool


@pytest.fixture
def encap(pool: Any) -> Encap:
    return lambda *batches, **options: pool.submit(refused.encap, *batches, **options).result(60)


@pytest.fixture
def decap(pool: Any) -> Decap:
    return lambda *batches: pool.submit(refused.decap, *batches).result(60)


def marked(number: int, length: int) -> bytes:
    """A payload that no other packet has."""
    return (number.to_bytes(2, "big") * (length // 2 + 1))[:length]


# encap --------------------------------------------------------------------------------------------------

# Sizes that make runs of six (its last shorter), four, one, one and three datagrams.
LENGTHS = [100] * 5 + [40] + [200] * 4 + [250] + [300] + [310] * 3
DATAGRAMS = [
    Packet("10.1.0.2", "10.2.0.2", protocol=UDP, ethernet=FROM_PODS, payload=marked(number, length))
    for number, length in enumerate(LENGTHS)
]
RUNS = plan([(0, 8 + len(packet.frame())) for packet in DATAGRAMS], max_segments=64)

SUPERFRAME = Packet(
    "10.1.0.2",
    "10.2.0.2",
    ethernet=FROM_PODS,
    flags=ACK | PSH,
    payload=b"".join(marked(n, 100) for n in range(9)),
)

DROPPED_AS = {
    errno.EAGAIN: "udp_full",
    errno.ENOBUFS: "udp_full",
    errno.EPERM: "udp_error",
    errno.EACCES: "udp_error",
    errno.ENETUNREACH: "udp_error",
    errno.EMSGSIZE: "too_big",
    errno.EIO: "udp_error",
    errno.EINVAL: "udp_error",
}
REFUSES_SEGMENTATION = (errno.EIO, errno.EINVAL)

every_error = pytest.mark.parametrize("error", DROPPED_AS, ids=errno.errorcode.get)


def from_pods(packets: list[Packet]) -> list[tuple[bytes, bytes]]:
    return [(NOTHING_ASKED, packet.frame()) for packet in packets]


def on_the_wire(packets: list[Packet]) -> list[bytes]:
    return [packet.but(ethernet=ON_THE_WIRE).frame() for packet in packets]


def assert_once_and_in_order(outcome: Outcome, sent: list[bytes]) -> None:
    position = {frame: at for at, frame in enumerate(sent)}
    assert len(position) == len(sent)
    places = [position[frame] for frame in outcome.delivered]
    assert places == sorted(set(places)), "once, and in order"
    assert outcome.forwarded == len(places)
    assert outcome.forwarded_bytes == sum(len(frame) - 14 for frame in outcome.delivered)
    assert sum(outcome.dropped.values()) == len(sent) - len(places)


def test_the_runs_are_what_the_cases_mean() -> None:
    assert [count for _, count, _ in RUNS] == [6, 4, 1, 1, 3]


def test_nothing_refused(encap: Encap) -> None:
    (outcome,) = encap(Batch(from_pods(DATAGRAMS)))
    assert outcome.delivered == on_the_wire(DATAGRAMS)
    assert outcome.attempts == len(RUNS)
    assert outcome.offloads["udp_segment"]


class TestOneRun:
    """One message of one sendmmsg is refused, whether once or each time it is tried."""

    @every_error
    @pytest.mark.parametrize("at", range(len(RUNS)))
    def test_refused_each_time(self, encap: Encap, error: int, at: int) -> None:
        first, count, _ = RUNS[at]
        # Behind others it is tried twice: sendmmsg tells an error only of its first message.
        refusal = Refusal(error, first=at, times=1 if at == 0 else 2)
        (outcome,) = encap(Batch(from_pods(DATAGRAMS), [refusal]))
        sent = on_the_wire(DATAGRAMS)
        assert_once_and_in_order(outcome, sent)
        if error in REFUSES_SEGMENTATION and count > 1:
            assert outcome.delivered == sent, "its datagrams leave one by one"
            assert not outcome.offloads["udp_segment"]
        else:
            assert outcome.delivered == sent[:first] + sent[first + count :], "no other is touched"
            assert outcome.dropped == {DROPPED_AS[error]: count}
            assert outcome.offloads["udp_segment"]

    @every_error
    @pytest.mark.parametrize("at", range(1, len(RUNS)))
    def test_refused_once_behind_others(self, encap: Encap, error: int, at: int) -> None:
        (outcome,) = encap(Batch(from_pods(DATAGRAMS), [Refusal(error, first=at, times=1)]))
        assert outcome.delivered == on_the_wire(DATAGRAMS)
        assert outcome.dropped == {}
        assert outcome.offloads["udp_segment"]

    @every_error
    @pytest.mark.parametrize("times", range(2, 12))
    @pytest.mark.parametrize("at", range(len(RUNS)))
    def test_refused_for_a_while(self, encap: Encap, error: int, at: int, times: int) -> None:
        (outcome,) = encap(Batch(from_pods(DATAGRAMS), [Refusal(error, first=at, times=times)]))
        assert_once_and_in_order(outcome, on_the_wire(DATAGRAMS))
        assert set(outcome.dropped) <= {DROPPED_AS[error]}
        assert len(outcome.delivered) >= RUNS[at][0], "what was before it had left"


class TestSegmentationItself:
    """A route that takes datagrams, but not UDP_SEGMENT."""

    @pytest.mark.parametrize("error", REFUSES_SEGMENTATION, ids=errno.errorcode.get)
    def test_is_given_up_and_nothing_is_lost(self, encap: Encap, error: int) -> None:
        refusal = Refusal(error, WHOLE)
        outcomes = encap(Batch(from_pods(DATAGRAMS), [refusal]), Batch(from_pods(DATAGRAMS), [refusal]))
        for outcome in outcomes:
            assert outcome.delivered == on_the_wire(DATAGRAMS)
            assert outcome.dropped == {}
            assert not outcome.offloads["udp_segment"]
        assert outcomes[1].attempts == len(DATAGRAMS), "it is not tried again"

    @pytest.mark.parametrize("error", REFUSES_SEGMENTATION, ids=errno.errorcode.get)
    def test_is_not_given_up_where_nothing_leaves_at_all(self, encap: Encap, error: int) -> None:
        refused, allowed = encap(Batch(from_pods(DATAGRAMS), [Refusal(error)]), Batch(from_pods(DATAGRAMS)))
        assert refused.delivered == []
        assert refused.dropped == {"udp_error": len(DATAGRAMS)}
        assert refused.offloads["udp_segment"]
        assert allowed.delivered == on_the_wire(DATAGRAMS)
        assert allowed.attempts == len(RUNS)

    @pytest.mark.parametrize("error", REFUSES_SEGMENTATION, ids=errno.errorcode.get)
    def test_is_not_given_up_where_only_a_shorter_last_one_leaves(self, encap: Encap, error: int) -> None:
        """So it looks, before Linux 6.14, when the path's MTU shrinks below the run's size."""
        six = DATAGRAMS[:6]
        (outcome,) = encap(
            Batch(from_pods(six), [Refusal(error, WHOLE), Refusal(errno.EMSGSIZE, PLAIN, times=5)])
        )
        assert outcome.delivered == on_the_wire(six)[5:]
        assert outcome.dropped == {"too_big": 5}
        assert outcome.offloads["udp_segment"]

    @every_error
    @pytest.mark.parametrize("at", range(6))
    def test_one_datagram_refused_while_they_leave_one_by_one(
        self, encap: Encap, error: int, at: int
    ) -> None:
        refusals = [Refusal(errno.EIO, WHOLE), Refusal(error, PLAIN, first=at, times=1)]
        (outcome,) = encap(Batch(from_pods(DATAGRAMS[:6]), refusals))
        sent = on_the_wire(DATAGRAMS[:6])
        assert outcome.delivered == sent[:at] + sent[at + 1 :]
        assert outcome.dropped == {DROPPED_AS[error]: 1}
        assert not outcome.offloads["udp_segment"]


def segments(virtio: bytes, frame: bytes) -> list[bytes]:
    cut = segment.cut(virtio, frame)
    assert isinstance(cut, list), "no superframe at all"
    return cut


class TestSuperframes:
    """Segments leave from where they were written, frames from where they were read; a run may have both."""

    SPANS = ((0, 1), (1, 11), (11, 13))
    """Of each run: the small frame behind the nine ends theirs, being shorter."""

    def batch(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """A small frame, a superframe of nine, a small frame, a superframe of two; and what must leave."""
        first, second = SUPERFRAME.superframe(100), SUPERFRAME.but(sequence=50_000).superframe(450)
        small = from_pods(DATAGRAMS[:2])
        leave = [small[0][1], *segments(*first), small[1][1], *segments(*second)]
        return [small[0], first, small[1], second], [ON_THE_WIRE + frame[12:] for frame in leave]

    def test_nothing_refused(self, encap: Encap) -> None:
        messages, sent = self.batch()
        (outcome,) = encap(Batch(messages))
        assert outcome.delivered == sent
        assert outcome.attempts == len(self.SPANS)

    @pytest.mark.parametrize(("size", "times"), [(8, 1), (100, 5), (1000, 8)])
    def test_more_segments_than_the_outbox_holds(self, encap: Encap, size: int, times: int) -> None:
        whole = SUPERFRAME.but(payload=b"".join(marked(n, 8) for n in range(2_500))).superframe(size)
        small = from_pods(DATAGRAMS[:2])
        (outcome,) = encap(Batch([small[0], *[whole] * times, small[1]]))
        cut = segments(*whole)
        sent = [small[0][1], *cut * times, small[1][1]]
        assert outcome.delivered == [ON_THE_WIRE + frame[12:] for frame in sent]

    @every_error
    @pytest.mark.parametrize("at", range(len(SPANS)))
    def test_refused_each_time(self, encap: Encap, error: int, at: int) -> None:
        messages, sent = self.batch()
        (outcome,) = encap(Batch(messages, [Refusal(error, first=at, times=1 if at == 0 else 2)]))
        assert_once_and_in_order(outcome, sent)
        lost = self.SPANS[at]
        if error in REFUSES_SEGMENTATION and at > 0:
            assert outcome.delivered == sent
        else:
            assert outcome.delivered == sent[: lost[0]] + sent[lost[1] :]
            assert outcome.dropped == {DROPPED_AS[error]: lost[1] - lost[0]}

    @pytest.mark.parametrize("at", range(9))
    def test_one_segment_refused_while_they_leave_one_by_one(self, encap: Encap, at: int) -> None:
        refusals = [Refusal(errno.EINVAL, WHOLE), Refusal(errno.ENOBUFS, PLAIN, first=at, times=1)]
        (outcome,) = encap(Batch([SUPERFRAME.superframe(100)], refusals))
        sent = [ON_THE_WIRE + frame[12:] for frame in segments(*SUPERFRAME.superframe(100))]
        assert outcome.delivered == sent[:at] + sent[at + 1 :]
        assert outcome.dropped == {"udp_full": 1}


PORTS = range(8)
EIGHT_FLOWS = [packet.but(source_port=port) for packet in DATAGRAMS for port in PORTS]


class TestManySockets:
    """Flows leave by several sockets: one sendmmsg each, and a refusal of one is none of the others'."""

    @every_error
    @pytest.mark.parametrize("at", [0, 1, 2, 5, 20, 60])
    @pytest.mark.parametrize("times", [1, 2, 30])
    def test_each_flow_in_its_order(self, encap: Encap, error: int, at: int, times: int) -> None:
        (outcome,) = encap(Batch(from_pods(EIGHT_FLOWS), [Refusal(error, first=at, times=times)]), senders=4)
        sent = on_the_wire(EIGHT_FLOWS)
        assert len(outcome.delivered) == len(set(outcome.delivered)) == outcome.forwarded
        assert set(outcome.delivered) <= set(sent)
        for port in PORTS:
            flow = [frame for frame in sent if frame[34:36] == port.to_bytes(2, "big")]
            places = [flow.index(frame) for frame in outcome.delivered if frame in flow]
            assert places == sorted(places)
        assert sum(outcome.dropped.values()) == len(sent) - len(outcome.delivered)
        assert set(outcome.dropped) <= {DROPPED_AS[error]}


UPLINK_VIRTIO, OUTER = 24, 14 + 20 + 8 + 8


CUT_INSTEAD = (errno.EINVAL, errno.EIO, errno.EBADFD)
"""What the uplink answers to a frame that is no superframe to it, while it is down, and when it is gone."""


class TestUplink:
    """TCP superframes that leave whole, inside their tunnel; what the uplink does not take is cut."""

    WHOLE = tuple(SUPERFRAME.but(sequence=10_000 * number) for number in range(1, 6))

    def messages(self) -> list[tuple[bytes, bytes]]:
        return [packet.superframe(100) for packet in self.WHOLE]

    @staticmethod
    def inside(outcome: Outcome) -> list[bytes]:
        """The inner superframes that went up, their outer headers checked."""
        for message in outcome.uplink:
            packet = message[UPLINK_VIRTIO + 14 :]
            assert int.from_bytes(packet[2:4], "big") == len(packet)
            assert int.from_bytes(packet[24:26], "big") == len(packet) - 20
        return [message[UPLINK_VIRTIO + OUTER :] for message in outcome.uplink]

    def whole(self, packets: tuple[Packet, ...]) -> list[bytes]:
        return [packet.but(ethernet=ON_THE_WIRE).partial() for packet in packets]

    def cut(self, packets: tuple[Packet, ...]) -> list[bytes]:
        return [ON_THE_WIRE + frame[12:] for packet in packets for frame in segments(*packet.superframe(100))]

    def test_nothing_refused(self, encap: Encap) -> None:
        (outcome,) = encap(Batch(self.messages()), uplink=True)
        assert self.inside(outcome) == self.whole(self.WHOLE)
        assert outcome.delivered == []
        assert outcome.forwarded == 9 * len(self.WHOLE)
        assert outcome.forwarded_bytes == sum(len(frame) - 14 for frame in self.cut(self.WHOLE))

    @pytest.mark.parametrize("error", CUT_INSTEAD, ids=errno.errorcode.get)
    @pytest.mark.parametrize("at", range(5))
    def test_one_is_not_taken_by_it(self, encap: Encap, error: int, at: int) -> None:
        """That one is cut. The next goes up again."""
        (outcome,) = encap(Batch(self.messages(), writes=[Refusal(error, first=at, times=1)]), uplink=True)
        assert self.inside(outcome) == self.whole(self.WHOLE[:at] + self.WHOLE[at + 1 :])
        assert outcome.delivered == self.cut(self.WHOLE[at : at + 1])
        assert outcome.dropped == {}
        assert outcome.offloads["uplink"]

    def test_a_row_of_refusals_gives_it_up(self, encap: Encap) -> None:
        many = tuple(SUPERFRAME.but(sequence=10_000 * number) for number in range(1, 21))
        (outcome,) = encap(
            Batch(
                [packet.superframe(100) for packet in many],
                writes=[Refusal(errno.EINVAL, first=0, times=16)],
            ),
            uplink=True,
        )
        assert outcome.uplink == []
        assert outcome.delivered == self.cut(many)
        assert outcome.dropped == {}
        assert not outcome.offloads["uplink"]

    @pytest.mark.parametrize("error", sorted(DROPPED_AS.keys() - set(CUT_INSTEAD)), ids=errno.errorcode.get)
    @pytest.mark.parametrize("at", range(5))
    def test_one_is_refused(self, encap: Encap, error: int, at: int) -> None:
        (outcome,) = encap(Batch(self.messages(), writes=[Refusal(error, first=at, times=1)]), uplink=True)
        assert self.inside(outcome) == self.whole(self.WHOLE[:at] + self.WHOLE[at + 1 :])
        assert outcome.delivered == []
        assert outcome.dropped == {DROPPED_AS[error]: 9}
        assert outcome.offloads["uplink"]

    @pytest.mark.parametrize("room", [0, 1, 14, 36, 49, 50, 51, 100])
    def test_what_its_outer_lengths_could_not_say_is_cut(self, encap: Encap, room: int) -> None:
        """The outer packet's lengths have 16 bits, and the inner one may fill them alone."""
        longest = SUPERFRAME.but(payload=bytes(65_535 - SUPERFRAME.headers_length - room))
        (outcome,) = encap(Batch([longest.superframe(1_398)]), uplink=True)
        if outcome.uplink:
            assert self.inside(outcome) == self.whole((longest,))
            assert outcome.delivered == []
        else:
            assert outcome.delivered == [
                ON_THE_WIRE + frame[12:] for frame in segments(*longest.superframe(1_398))
            ]
        assert bool(outcome.uplink) == (room >= OUTER)
        assert outcome.dropped == {}


# decap --------------------------------------------------------------------------------------------------


def train(first: Packet, count: int) -> list[Packet]:
    packets = [first]
    for number in range(1, count):
        packets.append(packets[-1].followed_by(marked(number, len(first.payload))))
    return packets


def from_peer(family: int, **fields: Any) -> Packet:
    ends = ("10.2.0.2", "10.1.0.2") if family == 4 else ("fd00:2::2", "fd00:1::2")
    return Packet(*ends, ethernet=FROM_PEER, payload=marked(0, 200)).but(**fields)


TCP_TRAIN = train(from_peer(4), 5)
UDP_TRAIN = train(from_peer(4, protocol=UDP), 4)
TCP6_TRAIN = train(from_peer(6), 3)
LONE_TCP = [from_peer(4, source_port=9)]
LONE_UDP = [from_peer(6, protocol=UDP)]
TRAINS = [TCP_TRAIN, LONE_TCP, UDP_TRAIN, LONE_UDP, TCP6_TRAIN]
"""Each becomes one write."""

PACKETS = [packet for train in TRAINS for packet in train]

WRITE_DROPPED_AS = {
    errno.EAGAIN: "tap_full",
    errno.ENOBUFS: "tap_full",
    errno.EIO: "tap_error",
    errno.EPERM: "tap_error",
    errno.ENOMEM: "tap_error",
    errno.EINVAL: "tap_error",
}
every_write_error = pytest.mark.parametrize("error", WRITE_DROPPED_AS, ids=errno.errorcode.get)


def frames_of(packets: list[Packet]) -> list[bytes]:
    return [packet.frame() for packet in packets]


def to_pods(packets: list[Packet]) -> list[bytes]:
    return [packet.but(ethernet=TO_PODS).frame() for packet in packets]


def apart(outcome: Outcome) -> list[bytes]:
    """The packets that a pod's stack would make of what was written."""
    packets: list[bytes] = []
    for virtio, frame in outcome.delivered:
        packets += [frame] if virtio == NOTHING_ASKED else segments(virtio, frame)
    assert outcome.forwarded == len(packets)
    assert outcome.forwarded_bytes == sum(len(packet) - 14 for packet in packets)
    return packets


def merges(packets: list[Packet]) -> str:
    return "merge_udp" if packets[0].protocol == UDP else "merge_tcp"


def test_no_write_refused(decap: Decap) -> None:
    (outcome,) = decap(Batch(frames_of(PACKETS)))
    assert apart(outcome) == to_pods(PACKETS)
    assert outcome.attempts == len(outcome.delivered) == len(TRAINS)


class TestWrites:
    @every_write_error
    @pytest.mark.parametrize("at", range(len(TRAINS)))
    def test_one_is_refused(self, decap: Decap, error: int, at: int) -> None:
        (outcome,) = decap(Batch(frames_of(PACKETS), writes=[Refusal(error, first=at, times=1)]))
        others = [packet for train in TRAINS[:at] + TRAINS[at + 1 :] for packet in train]
        on = {name for name in ("merge_tcp", "merge_udp") if outcome.offloads[name]}
        if error == errno.EINVAL and len(TRAINS[at]) > 1:
            assert apart(outcome) == to_pods(PACKETS), "its packets are written one by one"
            assert outcome.dropped == {}
            assert on == {"merge_tcp", "merge_udp"} - {merges(TRAINS[at])}
        else:
            assert apart(outcome) == to_pods(others), "no other is touched"
            assert outcome.dropped == {WRITE_DROPPED_AS[error]: len(TRAINS[at])}
            assert on == {"merge_tcp", "merge_udp"}

    @every_write_error
    @pytest.mark.parametrize("first", range(len(TRAINS)))
    def test_refused_from_then_on(self, decap: Decap, error: int, first: int) -> None:
        refused, after = decap(
            Batch(frames_of(PACKETS), writes=[Refusal(error, first=first)]), Batch(frames_of(PACKETS))
        )
        before = [packet for train in TRAINS[:first] for packet in train]
        assert apart(refused) == to_pods(before)
        assert refused.dropped == {WRITE_DROPPED_AS[error]: len(PACKETS) - len(before)}
        assert refused.offloads["merge_tcp"], "nothing was written one by one either: not the merging's fault"
        assert refused.offloads["merge_udp"]
        assert apart(after) == to_pods(PACKETS)
        assert after.attempts == len(TRAINS)

    def test_a_tap_that_takes_no_superframe(self, decap: Decap) -> None:
        refusal = Refusal(errno.EINVAL, WHOLE)
        outcomes = decap(
            Batch(frames_of(PACKETS), writes=[refusal]), Batch(frames_of(PACKETS), writes=[refusal])
        )
        for outcome in outcomes:
            assert apart(outcome) == to_pods(PACKETS)
            assert outcome.dropped == {}
            assert not outcome.offloads["merge_tcp"]
            assert not outcome.offloads["merge_udp"]
        assert outcomes[1].attempts == len(PACKETS), "it is not tried again"

    @every_write_error
    @pytest.mark.parametrize("train", [TCP_TRAIN, UDP_TRAIN, TCP6_TRAIN], ids=["TCP", "UDP", "TCP over IPv6"])
    @pytest.mark.parametrize("at", range(5))
    def test_one_packet_refused_while_they_are_written_one_by_one(
        self, decap: Decap, error: int, train: list[Packet], at: int
    ) -> None:
        refusals = [Refusal(errno.EINVAL, WHOLE), Refusal(error, PLAIN, first=at, times=1)]
        (outcome,) = decap(Batch(frames_of(train), writes=refusals))
        packets = to_pods(train)
        assert apart(outcome) == packets[:at] + packets[at + 1 :]
        assert outcome.dropped == ({WRITE_DROPPED_AS[error]: 1} if at < len(train) else {})
        assert not outcome.offloads[merges(train)]

    @pytest.mark.parametrize("complete", [(), (0,), (1,), (0, 1, 2, 3, 4)])
    def test_partial_checksums_stay_marked_one_by_one(self, decap: Decap, complete: tuple[int, ...]) -> None:
        """They came so from a peer on the same host; the stack must still be told."""
        frames = [
            packet.frame() if number in complete else packet.partial()
            for number, packet in enumerate(TCP_TRAIN)
        ]
        (outcome,) = decap(Batch(frames, writes=[Refusal(errno.EINVAL, WHOLE)]))
        asked = bytes([1, 0, 0, 0, 0, 0, 34, 0, 16, 0])
        expected = [
            (NOTHING_ASKED if number in complete else asked, TO_PODS + frame[12:])
            for number, frame in enumerate(frames)
        ]
        assert outcome.delivered == expected

    def test_a_superframe_that_came_whole_and_is_refused_is_counted(self, decap: Decap) -> None:
        """There is nothing to write it as but what it is."""
        whole = TCP_TRAIN[0].but(payload=marked(7, 4_000))
        (outcome,) = decap(
            Batch([whole.partial(), LONE_TCP[0].frame()], writes=[Refusal(errno.EINVAL, WHOLE)])
        )
        assert outcome.delivered == [(NOTHING_ASKED, to_pods(LONE_TCP)[0])]
        assert outcome.dropped == {"tap_error": 1}
        assert outcome.offloads["merge_tcp"]
