from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.bfd import (
    FAST_SECONDS,
    MULTIPLIER,
    PACKET_BYTES,
    SLOW_SECONDS,
    Diagnostic,
    Packet,
    RefusedError,
    Session,
    State,
    decode,
    encode,
)

DETECTION = MULTIPLIER * FAST_SECONDS
UP = Packet(State.UP, 0, mine=1, yours=2, desired_min_tx=500_000, required_min_rx=250_000)

packets = st.builds(
    Packet,
    state=st.sampled_from(State),
    diagnostic=st.integers(0, 31),
    mine=st.integers(1, 2**32 - 1),
    yours=st.integers(1, 2**32 - 1),
    desired_min_tx=st.integers(0, 2**32 - 1),
    required_min_rx=st.integers(0, 2**32 - 1),
    multiplier=st.integers(1, 255),
    poll=st.booleans(),
    final=st.booleans(),
)


@given(packets, st.integers(0, 2000))
def test_what_is_decoded_is_what_was_encoded(packet: Packet, length: int) -> None:
    data = encode(packet, length)
    assert len(data) == max(length, PACKET_BYTES)
    assert decode(data) == packet


def test_the_packet_on_the_wire() -> None:
    """RFC 5880 section 4.1, by hand."""
    text = "20 e0 03 18 00000001 00000002 0007a120 0003d090 00000000"
    assert encode(Packet(State.UP, 0, 1, 2, 500_000, 250_000, poll=True)) == bytes.fromhex(text)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 0x40, "version"),
        (1, 0xC4, "authentication"),
        (1, 0xC1, "malformed"),
        (2, 0, "malformed"),
        (3, PACKET_BYTES - 1, "length"),
        (3, PACKET_BYTES + 1, "length"),
        (7, 0, "malformed"),  # my discriminator is zero
        (11, 0, "discriminator"),  # yours is, of a session that is up
    ],
)
def test_what_is_refused(at: int, value: int, reason: str) -> None:
    data = bytearray(encode(UP))
    data[at] = value
    with pytest.raises(RefusedError, match=reason):
        decode(bytes(data))


@given(st.binary(max_size=64))
def test_junk_is_refused_or_a_packet(data: bytes) -> None:
    try:
        decode(data)
    except RefusedError:
        return


def test_a_session_that_is_down_may_not_know_the_other_yet() -> None:
    assert decode(encode(Packet(State.DOWN, 0, 7, 0, 1, 1))).yours == 0


@pytest.mark.parametrize("length", range(PACKET_BYTES))
def test_what_is_short_is_refused(length: int) -> None:
    with pytest.raises(RefusedError, match="short"):
        decode(encode(UP)[:length])


@pytest.mark.parametrize(
    ("state", "remote", "becomes"),
    [
        # RFC 5880 section 6.2: ours, theirs, and ours then.
        (State.DOWN, State.ADMIN_DOWN, State.DOWN),
        (State.DOWN, State.DOWN, State.INIT),
        (State.DOWN, State.INIT, State.UP),
        (State.DOWN, State.UP, State.DOWN),
        (State.INIT, State.ADMIN_DOWN, State.DOWN),
        (State.INIT, State.DOWN, State.INIT),
        (State.INIT, State.INIT, State.UP),
        (State.INIT, State.UP, State.UP),
        (State.UP, State.ADMIN_DOWN, State.DOWN),
        (State.UP, State.DOWN, State.DOWN),
        (State.UP, State.INIT, State.UP),
        (State.UP, State.UP, State.UP),
    ],
)
def test_the_state_machine(state: State, remote: State, becomes: State) -> None:
    session = Session(2)
    session.state = state
    session.receive(Packet(remote, 0, 1, 2, 1, 1), now=1.0)
    assert session.state == becomes


class Pair:
    """Two sessions and what is between them; `cut` names the ends whose packets are lost."""

    def __init__(self) -> None:
        self.ends = [Session(11), Session(22)]
        self.now = 0.0
        self.cut: set[int] = set()
        self.sent: list[tuple[float, int, Packet]] = []

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            for number, session in enumerate(self.ends):
                if (packet := session.tick(self.now, 1.0)) is not None:
                    self.pass_on(number, packet)
            self.now += 0.01

    def pass_on(self, number: int, packet: Packet) -> None:
        self.sent.append((self.now, number, packet))
        if number not in self.cut:
            answer = self.ends[1 - number].receive(decode(encode(packet)), self.now)
            if answer is not None:
                self.pass_on(1 - number, answer)

    @property
    def states(self) -> list[State]:
        return [session.state for session in self.ends]


def up() -> Pair:
    pair = Pair()
    pair.run(3 * SLOW_SECONDS)
    assert pair.states == [State.UP, State.UP]
    return pair


def test_both_come_up_and_stay() -> None:
    pair = up()
    pair.sent.clear()
    pair.run(60)
    assert pair.states == [State.UP, State.UP]
    assert len(pair.sent) == pytest.approx(2 * 60 / FAST_SECONDS, rel=0.05)
    assert not any(packet.poll for _, _, packet in pair.sent), "the Poll sequence ended"


def test_up_is_announced_by_a_poll_that_is_answered() -> None:
    pair = up()
    assert {number for _, number, packet in pair.sent if packet.poll} == {0, 1}
    assert {number for _, number, packet in pair.sent if packet.final} == {0, 1}
    assert not any(packet.poll and packet.final for _, _, packet in pair.sent)


@pytest.mark.parametrize("cut", [{0}, {1}, {0, 1}])
def test_silence_either_way_takes_both_down(cut: set[int]) -> None:
    pair = up()
    pair.cut = cut
    pair.run(DETECTION + 0.02)
    assert set(pair.states) <= {State.DOWN, State.INIT}
    pair.run(30)
    assert State.UP not in pair.states
    pair.cut = set()
    pair.run(3 * SLOW_SECONDS)
    assert pair.states == [State.UP, State.UP]


def test_less_loss_than_the_multiplier_is_borne() -> None:
    pair = up()
    for _ in range(5):
        pair.cut = {0}
        pair.run((MULTIPLIER - 1) * FAST_SECONDS)
        pair.cut = set()
        pair.run(2 * FAST_SECONDS)
        assert pair.states == [State.UP, State.UP]


def test_down_says_why_and_that_slowly() -> None:
    pair = up()
    pair.cut = {0, 1}
    pair.sent.clear()
    pair.run(DETECTION + 10)
    later = [
        (when, packet) for when, number, packet in pair.sent if number == 0 and packet.state == State.DOWN
    ]
    assert {packet.diagnostic for _, packet in later} == {Diagnostic.TIME_EXPIRED}
    assert {packet.yours for _, packet in later} == {0}
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(later)]
    assert min(gaps) == pytest.approx(SLOW_SECONDS, abs=0.02)


def test_a_neighbour_that_began_anew_is_met_again() -> None:
    pair = up()
    pair.ends[1] = Session(33)
    pair.run(0.5)
    assert pair.ends[0].state != State.UP or pair.ends[1].state == State.UP
    pair.run(3 * SLOW_SECONDS)
    assert pair.states == [State.UP, State.UP]


def test_another_sessions_packet_is_refused() -> None:
    session = Session(2)
    with pytest.raises(RefusedError, match="discriminator"):
        session.receive(Packet(State.INIT, 0, 1, 3, 1, 1), now=1.0)
    assert session.state == State.DOWN


def test_who_wants_no_packets_gets_none() -> None:
    session = Session(2)
    session.receive(Packet(State.DOWN, 0, 1, 0, 1, required_min_rx=0), now=1.0)
    assert session.tick(100.0, 1.0) is None


def test_who_wants_few_packets_gets_few() -> None:
    session = Session(2)
    session.receive(Packet(State.UP, 0, 1, 2, 1, required_min_rx=5_000_000), now=1.0)
    assert session.tick(1.0, 1.0) is not None
    assert session.tick(5.9, 1.0) is None
    assert session.tick(6.0, 1.0) is not None
