from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from forwarder.health import (
    BATCH,
    MAX_PROBES_PER_SECOND,
    PADDED_INTERVALS,
    Health,
    Send,
    State,
)
from forwarder.probe import PROBE_BYTES, Report, decode
from tests.unit.health_wire import DEVICE_MTU, ONE, TWO, Wire

UP, DOWN, UNKNOWN = State.UP, State.DOWN, State.UNKNOWN
BOTH_UP, BOTH_DOWN = (UP, UP), (DOWN, DOWN)
PROMISED_SECONDS = 10.0


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def working(wire: Wire) -> Wire:
    wire.run_until(lambda: wire.states() == BOTH_UP, 2.0)
    wire.run(5.0)
    return wire


def record(wire: Wire) -> list[Send]:
    """What the first node sends from now on."""
    sends: list[Send] = []

    def note(send: Send) -> bool:
        sends.append(send)
        return False

    wire.directions[ONE].loses = note
    return sends


class TestUpAndDown:
    def test_nothing_is_known_at_first(self, wire: Wire) -> None:
        assert wire.states() == (UNKNOWN, UNKNOWN)
        assert wire.of(ONE).rtt_seconds is wire.of(ONE).encap_loss is wire.of(ONE).decap_loss is None

    def test_both_are_up_within_an_interval_and_a_round_trip(self, wire: Wire) -> None:
        assert wire.run_until(lambda: wire.states() == BOTH_UP, 2.0) <= 1.0 + 0.01

    def test_a_peer_that_never_was_there_is_down(self, wire: Wire) -> None:
        wire.stop(TWO)
        assert 3.0 < wire.run_until(lambda: wire.state(ONE) == DOWN, PROMISED_SECONDS) < 5.0
        assert wire.changes[ONE] == [DOWN]

    @pytest.mark.parametrize("dead", [(ONE,), (TWO,), (ONE, TWO)], ids="-".join)
    def test_a_dead_direction_is_down_on_both_sides_and_heals(self, working: Wire, dead: tuple[str]) -> None:
        for name in dead:
            working.directions[name].is_cut = True
        took = working.run_until(lambda: working.states() == BOTH_DOWN, PROMISED_SECONDS)
        assert took > 2.0, "one lost probe is not a dead path"
        working.run(60.0)
        assert working.states() == BOTH_DOWN
        for name in dead:
            working.directions[name].is_cut = False
        assert working.run_until(lambda: working.states() == BOTH_UP, PROMISED_SECONDS) > 1.0
        working.run(600.0)
        assert working.changes == {ONE: [UP, DOWN, UP], TWO: [UP, DOWN, UP]}

    def test_since_is_when_it_changed(self, working: Wire) -> None:
        since = working.of(ONE).since
        working.run(50.0)
        assert working.of(ONE).since == since
        working.directions[TWO].is_cut = True
        at = working.now + working.run_until(lambda: working.state(ONE) == DOWN, PROMISED_SECONDS)
        working.run(50.0)
        assert working.of(ONE).since == pytest.approx(at, abs=0.011)

    def test_two_lost_reports_are_not_down(self, working: Wire) -> None:
        for _ in range(20):
            lost = working.directions[ONE].sent + 2

            def loses(send: Send, lost: int = lost) -> bool:
                return working.directions[ONE].sent <= lost and send.size_bytes is None

            working.directions[ONE].loses = loses
            working.run(20.0)
        assert working.changes == {ONE: [UP], TWO: [UP]}

    def test_reports_out_of_order(self, working: Wire) -> None:
        """The delay of each differs by more than an interval."""
        for direction in working.directions.values():

            def shuffles(send: Send, direction: object = direction) -> bool:
                direction.delay = working.random.uniform(0, 1.5)  # type: ignore[attr-defined]
                return False

            direction.loses = shuffles
        working.run(300.0)
        assert working.changes == {ONE: [UP], TWO: [UP]}
        assert working.of(ONE).decap_loss == pytest.approx(0, abs=0.07)  # the latest are under way

    def test_a_peer_that_starts_again_was_never_down(self, working: Wire) -> None:
        working.stop(TWO)
        working.run(1.5)
        working.start(TWO)
        working.run(30.0)
        assert working.changes == {ONE: [UP], TWO: [UP, UP]}

    def test_a_peer_that_starts_again_and_does_not_hear_is_down(self, working: Wire) -> None:
        working.stop(TWO)
        working.directions[ONE].is_cut = True
        working.start(TWO)
        assert working.run_until(lambda: working.state(ONE) == DOWN, PROMISED_SECONDS) > 2.0

    def test_a_peer_that_is_removed_says_and_gets_nothing(self, working: Wire) -> None:
        one = working.nodes[ONE]
        one.remove(TWO)
        one.remove(TWO)
        assert one.state(TWO, working.now) is None
        assert one.short_path_bytes(TWO) is None
        sent = working.directions[ONE].sent
        working.run(10.0)
        assert (working.directions[ONE].sent, one.next_at()) == (sent, None)
        assert working.state(TWO) == DOWN

    def test_adding_a_peer_twice_changes_nothing(self, working: Wire) -> None:
        before = working.of(ONE)
        working.nodes[ONE].add(TWO, working.now)
        assert working.of(ONE) == before


FLAPPING: dict[str, Callable[[Wire], bool]] = {
    "every other second is lost": lambda wire: int(wire.now) % 2 == 0,
    "half are lost at random": lambda wire: wire.random.random() < 0.5,
    "four of five are lost at random": lambda wire: wire.random.random() < 0.8,
    "5 s on, 5 s off": lambda wire: wire.now % 10 < 5,
    "10 s on, 10 s off": lambda wire: wire.now % 20 < 10,
    "20 s on, 5 s off": lambda wire: wire.now % 25 < 5,
}


class TestFlapping:
    """What comes and goes must not take the state with it each time."""

    @pytest.mark.parametrize("case", FLAPPING)
    @pytest.mark.parametrize("direction", [ONE, TWO])
    def test_changes_in_an_hour_are_few(self, case: str, direction: str) -> None:
        wire = Wire(seed=7)
        wire.run(10.0)
        assert wire.states() == BOTH_UP
        wire.directions[direction].loses = lambda _: FLAPPING[case](wire)
        wire.run(3600.0)
        for name in (ONE, TWO):
            assert len(wire.changes[name]) <= 1 + 2 * 6
        wire.directions[direction].loses = lambda _: False
        wire.run_until(lambda: wire.states() == BOTH_UP, 40.0)

    def test_a_calm_time_forgives(self, working: Wire) -> None:
        def outage() -> float:
            working.directions[ONE].is_cut = True
            working.run(10.0)
            working.directions[ONE].is_cut = False
            return working.run_until(lambda: working.states() == BOTH_UP, 40.0)

        first, second, third = outage(), outage(), outage()
        assert second > first + 1.0
        assert third > second + 3.0
        working.run(400.0)
        assert outage() == pytest.approx(first, abs=1.5)


class TestFigures:
    def test_round_trip_time_is_without_the_waiting_at_the_peer(self, working: Wire) -> None:
        working.directions[ONE].delay, working.directions[TWO].delay = 0.030, 0.010
        working.run(60.0)
        for name in (ONE, TWO):
            assert working.of(name).rtt_seconds == pytest.approx(0.040, abs=1e-5)
            assert working.of(name).smoothed_rtt_seconds == pytest.approx(0.040, abs=1e-3)

    def test_smoothed(self, working: Wire) -> None:
        """RFC 6298: a lone value moves it by an eighth."""
        before = working.of(ONE).smoothed_rtt_seconds
        assert before is not None
        working.directions[ONE].delay = 0.101
        working.run_until(lambda: (working.of(ONE).rtt_seconds or 0) > 0.1, 3.0)
        assert working.of(ONE).smoothed_rtt_seconds == pytest.approx(before + 0.1 / 8, rel=0.01)

    def test_loss_is_told_by_direction(self, working: Wire) -> None:
        random_ = random.Random(3)
        working.directions[ONE].loses = lambda _: random_.random() < 0.25
        working.run(300.0)
        one, two = working.of(ONE), working.of(TWO)
        assert one.encap_loss == pytest.approx(0.25, abs=0.15)
        assert two.decap_loss == pytest.approx(0.25, abs=0.15)
        assert (one.decap_loss, two.encap_loss) == (0, 0)
        working.directions[ONE].loses = lambda _: False
        working.run(80.0)
        assert working.of(ONE).encap_loss == working.of(TWO).decap_loss == 0

    def test_silence_is_loss(self, working: Wire) -> None:
        working.directions[TWO].is_cut = True
        working.run(33.0)
        assert working.of(ONE).decap_loss == pytest.approx(0.5, abs=0.05)
        assert working.of(ONE).encap_loss is None, "there is nobody to tell"
        working.run(100.0)
        assert working.of(ONE).decap_loss == 1.0

    def test_what_was_sent_while_a_peer_was_not_there_is_not_lost(self, working: Wire) -> None:
        working.stop(TWO)
        working.run(30.0)
        working.start(TWO)
        working.run(3.0)
        assert working.of(ONE).encap_loss == 0


class TestTime:
    def test_only_differences_count(self) -> None:
        changes = []
        for now in (0.0, 1e9):
            wire = Wire(now=now)
            wire.run(20.0)
            wire.directions[ONE].is_cut = True
            wire.run(20.0)
            changes.append(wire.changes)
        assert changes[0] == changes[1] == {ONE: [UP, DOWN], TWO: [UP, DOWN]}

    @pytest.mark.parametrize("seconds", [2.0, 30.0, 86_400.0])
    def test_our_own_standstill_is_not_the_peers_silence(self, working: Wire, seconds: float) -> None:
        """A daemon that was stopped finds the peer's reports in its socket only after it has polled."""
        one = working.nodes[ONE]
        working.now += seconds
        one.poll(working.now)
        assert working.state(ONE) == UP
        for _ in range(5):
            assert one.poll(working.now) is not None
        assert working.state(ONE) == UP

    def test_a_standstill_hides_no_silence_for_long(self, working: Wire) -> None:
        working.stop(TWO)
        working.now += 30.0
        assert working.run_until(lambda: working.state(ONE) == DOWN, PROMISED_SECONDS) > 2.0


class TestPathMtu:
    def test_nothing_is_short_where_all_passes(self, working: Wire) -> None:
        working.run(600.0)
        assert (working.short(ONE), working.short(TWO)) == (None, None)

    @pytest.mark.parametrize("carries", [647, 1000, 1280, 1399, 1400, 1492, 1499])
    def test_a_black_hole_is_measured_to_the_byte(self, working: Wire, carries: int) -> None:
        working.directions[ONE].carries = carries
        took = working.run_until(lambda: working.short(ONE) is not None, 20.0)
        assert took < 15.0
        assert (working.short(ONE), working.short(TWO)) == (carries, None)
        working.run(120.0)
        assert working.short(ONE) == carries
        assert working.states() == BOTH_UP
        working.directions[ONE].carries = DEVICE_MTU
        working.run_until(lambda: working.short(ONE) is None, 15.0)
        assert working.changes == {ONE: [UP], TWO: [UP]}

    def test_each_direction_has_its_own(self, working: Wire) -> None:
        working.directions[ONE].carries, working.directions[TWO].carries = 1400, 1300
        working.run(30.0)
        assert (working.short(ONE), working.short(TWO)) == (1400, 1300)

    def test_a_hole_that_grows(self, working: Wire) -> None:
        for carries in (1450, 1350, 900):
            working.directions[ONE].carries = carries
            working.run(30.0)
            assert working.short(ONE) == carries

    def test_a_hole_that_shrinks_a_little_is_found_after_minutes(self, working: Wire) -> None:
        working.directions[ONE].carries = 1300
        working.run(30.0)
        working.directions[ONE].carries = 1400
        working.run_until(lambda: working.short(ONE) == 1400, 1200.0)

    def test_less_than_the_floor_is_the_floor(self, working: Wire) -> None:
        working.directions[ONE].carries = 500
        working.run(60.0)
        assert working.short(ONE) == 646

    def test_lost_reports_are_no_black_hole(self, working: Wire) -> None:
        for direction in working.directions.values():
            direction.loses = lambda _: working.random.random() < 0.1
        seen = set()
        for _ in range(600):
            working.run(1.0)
            seen |= {working.short(ONE), working.short(TWO)}
        assert seen == {None}

    def test_what_the_kernel_knows_is_not_searched_for(self, working: Wire) -> None:
        working.directions[ONE].carries = 1400
        working.nodes[ONE].limit(TWO, 1400)
        sizes = self.sizes_sent(working, 60.0)
        assert sizes == {1400}
        assert working.short(ONE) is None

    def test_the_kernel_learns_while_we_search(self, working: Wire) -> None:
        working.directions[ONE].carries = 1400
        working.run_until(lambda: working.short(ONE) is not None, 20.0)
        working.nodes[ONE].limit(TWO, 1400)
        assert working.short(ONE) is None
        working.run(60.0)
        assert working.short(ONE) is None
        working.nodes[ONE].limit(TWO, DEVICE_MTU)
        working.run(20.0)
        assert working.short(ONE) == 1400, "the kernel forgets after minutes"

    def test_long_round_trips(self, working: Wire) -> None:
        for direction in working.directions.values():
            direction.delay = 0.4
        working.directions[ONE].carries = 1400
        working.run_until(lambda: working.short(ONE) == 1400, 40.0)

    def test_a_dead_path_is_not_searched(self, working: Wire) -> None:
        working.directions[TWO].is_cut = True
        working.run(10.0)
        assert self.sizes_sent(working, 60.0) == set()

    def sizes_sent(self, wire: Wire, seconds: float) -> set[int]:
        sends = record(wire)
        wire.run(seconds)
        return {send.size_bytes for send in sends if send.size_bytes is not None}

    def test_how_often(self, working: Wire) -> None:
        sends = record(working)
        working.run(300.0)
        count = len([send for send in sends if send.size_bytes is not None])
        assert count == pytest.approx(300 / PADDED_INTERVALS, abs=5)


class TestNoAmplifier:
    def test_a_peer_makes_us_send_no_more_than_it_sends(self) -> None:
        rng = random.Random(5)
        health = Health(1, rng.random)
        health.add("peer", 0.0)
        answers = 0
        for i in range(1000):
            report = Report(
                session=rng.randrange(1, 5),
                sequence=rng.randrange(1 << 32),
                interval_ms=rng.choice([1, 10, 65_535]),
                detect_multiplier=1,
                wants_answer=rng.random() < 0.5,
                hears=rng.random() < 0.5,
                heard_session=1,
                heard_sequence=rng.randrange(1 << 32),
                heard_mask=rng.randrange(1 << 64),
                heard_padded=rng.randrange(1 << 32),
            )
            sends = health.hear("peer", report, i * 1e-6)
            assert len(sends) <= 1
            assert all(send.size_bytes is None for send in sends)
            answers += len(sends)
        assert 0 < answers <= 1000

    def test_a_stranger_is_not_answered(self) -> None:
        health = Health(1, random.random)
        report = Report(session=1, sequence=1, interval_ms=1000, detect_multiplier=3, wants_answer=True)
        assert health.hear("nobody", report, 0.0) == []


class TestMany:
    COUNT = 5000

    def rate(self, count: int, seconds: float) -> tuple[float, float]:
        """Probes a second with so many peers that say nothing, and the longest pause of one of them."""
        health = Health(1, random.Random(1).random)
        now = 0.0
        for i in range(count):
            health.add(f"n{i}", now)
        sent, last, pause = 0, dict[str, float](), 0.0
        while (due := health.next_at()) is not None and due < seconds:
            now = max(now + 0.02, due)
            sends = health.poll(now)
            assert len(sends) <= BATCH
            sent += len(sends)
            for send in sends:
                pause = max(pause, now - last.get(send.peer_id, now))
                last[send.peer_id] = now
        assert len(last) == count
        return sent / seconds, pause

    def test_a_few_are_probed_each_interval(self) -> None:
        rate, pause = self.rate(10, 60.0)
        assert rate == pytest.approx(10 / 0.875, rel=0.05)
        assert pause <= 1.03

    def test_intervals_are_stretched(self) -> None:
        rate, pause = self.rate(self.COUNT, 20.0)
        assert rate == pytest.approx(MAX_PROBES_PER_SECOND / 0.875, rel=0.1)
        assert pause <= self.COUNT / MAX_PROBES_PER_SECOND + 0.5

    def test_the_peer_is_told_of_the_stretched_interval(self) -> None:
        health = Health(1, random.random)
        for i in range(self.COUNT):
            health.add(f"n{i}", 0.0)
        message = decode(health.poll(10.0)[0].probe)
        assert isinstance(message, Report)
        assert message.interval_ms == self.COUNT * 1000 // MAX_PROBES_PER_SECOND
        assert 3 * message.interval_ms / 1000 < PROMISED_SECONDS

    def test_they_do_not_come_in_waves(self) -> None:
        health = Health(1, random.Random(1).random)
        for i in range(1000):
            health.add(f"n{i}", 0.0)
        counts, now = [], 0.0
        while now < 30.0:
            now += 0.1
            counts.append(len(health.poll(now)))
        assert max(counts[20:]) < 3 * 1000 * 0.1 / 0.875


def test_flows_take_turns_and_a_pair_shares_one(working: Wire) -> None:
    sends = record(working)
    working.run(60.0)
    assert {send.flow % 8 for send in sends} == set(range(8))
    for before, after in pairwise(sends):
        if before.size_bytes is not None:
            assert (after.size_bytes, after.flow) == (None, before.flow)
    assert all(len(send.probe) == PROBE_BYTES for send in sends)
