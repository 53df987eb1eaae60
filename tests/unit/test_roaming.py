from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.probe import PROBE_BYTES
from forwarder.probe import decode as decode_probe
from forwarder.roaming import (
    CHALLENGE,
    COOKIE_SECONDS,
    HELLO,
    HELLO_SECONDS,
    RESPONSE,
    Answer,
    Message,
    Moved,
    Place,
    Roaming,
    decode,
    encode,
    name_of,
)

KEY = b"0123456789abcdef"
ONE, TWO, THREE = "one", "two", "three"
HOME: dict[str, Place] = {
    name: (ip_address(f"192.0.2.{number}"), 6081) for number, name in enumerate((ONE, TWO, THREE), 1)
}
NAT: Place = (ip_address("203.0.113.9"), 40_000)
THIEF: Place = (ip_address("198.51.100.66"), 6081)
NAMES = st.binary(min_size=8, max_size=8)
MESSAGES = st.builds(Message, st.sampled_from([HELLO, CHALLENGE, RESPONSE]), NAMES, NAMES, NAMES, NAMES)


@dataclass
class Node:
    """One node, and where it takes the others to be."""

    name: str
    key: bytes = KEY
    places: dict[str, Place] = field(default_factory=lambda: dict(HOME))

    def __post_init__(self) -> None:
        self.roaming = Roaming(self.name, self.key, os.urandom)
        for peer in HOME:
            if peer != self.name:
                self.roaming.add(peer, 0.0)

    def hello(self, peer: str, now: float) -> bytes:
        return dict(self.roaming.hellos(now))[peer]

    def hear(self, probe: bytes, place: Place, now: float = 0.0) -> Answer | Moved | None:
        owner = next((name for name, (address, _) in self.places.items() if address == place[0]), None)
        outcome = self.roaming.hear(probe, place, lambda: owner, lambda peer: (self.places[peer],), now)
        if isinstance(outcome, Moved):
            self.places[outcome.peer_id] = outcome.place
        return outcome


def challenge_of(node: Node, hello: bytes, place: Place, now: float = 0.0) -> bytes:
    outcome = node.hear(hello, place, now)
    assert isinstance(outcome, Answer)
    assert outcome.place == place
    return outcome.probe


def answer_to(node: Node, challenge: bytes, place: Place, now: float = 0.0) -> bytes:
    outcome = node.hear(challenge, place, now)
    assert isinstance(outcome, Answer)
    return outcome.probe


@pytest.fixture
def one() -> Node:
    return Node(ONE)


@pytest.fixture
def two() -> Node:
    return Node(TWO)


class TestMessages:
    @given(MESSAGES, st.binary(min_size=16, max_size=64))
    def test_each_survives(self, message: Message, key: bytes) -> None:
        probe = encode(message, key)
        assert len(probe) == PROBE_BYTES
        assert decode(probe, key) == message

    @given(MESSAGES, st.integers(0, PROBE_BYTES - 1), st.integers(1, 255))
    def test_a_changed_byte_is_not_authentic(self, message: Message, at: int, flip: int) -> None:
        probe = bytearray(encode(message, KEY))
        probe[at] ^= flip
        assert decode(bytes(probe), KEY) is None

    @given(MESSAGES)
    def test_another_key(self, message: Message) -> None:
        assert decode(encode(message, KEY), KEY + b"x") is None

    @given(st.binary(max_size=80) | st.binary(min_size=60, max_size=60).map(lambda b: b"pl\x01\x10" + b))
    def test_junk(self, probe: bytes) -> None:
        assert decode(probe, KEY) is None

    @given(MESSAGES)
    def test_is_no_report(self, message: Message) -> None:
        assert decode_probe(encode(message, KEY)) is None


class TestMoving:
    def test_a_peer_behind_a_nat_is_found(self, one: Node, two: Node) -> None:
        challenge = challenge_of(two, one.hello(TWO, 0.0), NAT)
        response = answer_to(one, challenge, HOME[TWO])
        assert two.hear(response, NAT) == Moved(ONE, NAT)

    def test_nothing_is_to_be_said_where_it_is_known_to_be(self, one: Node, two: Node) -> None:
        assert two.hear(one.hello(TWO, 0.0), HOME[ONE]) is None

    def test_a_port_alone_may_change(self, one: Node, two: Node) -> None:
        two.places[ONE] = NAT
        again = (NAT[0], NAT[1] + 1)
        challenge = challenge_of(two, one.hello(TWO, 0.0), again)
        assert two.hear(answer_to(one, challenge, HOME[TWO]), again) == Moved(ONE, again)

    def test_and_it_comes_home(self, one: Node, two: Node) -> None:
        two.places[ONE] = NAT
        challenge = challenge_of(two, one.hello(TWO, 0.0), HOME[ONE])
        assert two.hear(answer_to(one, challenge, HOME[TWO]), HOME[ONE]) == Moved(ONE, HOME[ONE])

    def test_late_within_the_cookies_life(self, one: Node, two: Node) -> None:
        begun = 100 * COOKIE_SECONDS + 0.1
        challenge = challenge_of(two, one.hello(TWO, begun), NAT, begun)
        response = answer_to(one, challenge, HOME[TWO], begun)
        assert isinstance(two.hear(response, NAT, begun + COOKIE_SECONDS), Moved)

    def test_no_amplifier(self, one: Node, two: Node) -> None:
        hello = one.hello(TWO, 0.0)
        challenge = challenge_of(two, hello, NAT)
        response = answer_to(one, challenge, HOME[TWO])
        assert len(hello) == len(challenge) == len(response) == PROBE_BYTES


class TestAttacks:
    def test_a_recorded_hello_moves_nobody(self, one: Node, two: Node) -> None:
        """It is challenged, like any; but what is sent there cannot be answered from there."""
        hello = one.hello(TWO, 0.0)
        for _ in range(3):
            challenge = challenge_of(two, hello, THIEF)
            assert two.hear(challenge, THIEF) is None
            assert two.hear(hello, HOME[ONE]) is None
        assert two.places[ONE] == HOME[ONE]

    def test_a_recorded_response_moves_nobody_elsewhere(self, one: Node, two: Node) -> None:
        response = answer_to(one, challenge_of(two, one.hello(TWO, 0.0), NAT), HOME[TWO])
        assert two.hear(response, THIEF) is None
        assert two.hear(response, (NAT[0], NAT[1] + 1)) is None

    def test_nor_later_to_where_the_peer_was(self, one: Node, two: Node) -> None:
        response = answer_to(one, challenge_of(two, one.hello(TWO, 0.0), NAT), HOME[TWO])
        assert isinstance(two.hear(response, NAT), Moved)
        two.places[ONE] = HOME[ONE]
        assert two.hear(response, NAT, 2 * COOKIE_SECONDS) is None

    def test_nor_in_another_life_of_the_daemon(self, one: Node, two: Node) -> None:
        response = answer_to(one, challenge_of(two, one.hello(TWO, 0.0), NAT), HOME[TWO])
        assert Node(TWO).hear(response, NAT) is None

    def test_only_the_peer_s_own_address_makes_us_respond(self, one: Node, two: Node) -> None:
        challenge = challenge_of(two, one.hello(TWO, 0.0), NAT)
        for place in (THIEF, HOME[THREE]):
            assert one.hear(challenge, place) is None

    def test_only_the_last_hello_is_challenged(self, one: Node, two: Node) -> None:
        challenge = challenge_of(two, one.hello(TWO, 0.0), NAT)
        one.hello(TWO, HELLO_SECONDS)
        assert one.hear(challenge, HOME[TWO]) is None

    def test_another_peer_s_address_is_not_to_be_had(self, one: Node, two: Node) -> None:
        assert two.hear(one.hello(TWO, 0.0), HOME[THREE]) is None
        assert two.hear(one.hello(TWO, HELLO_SECONDS), (HOME[THREE][0], 7)) is None

    def test_what_is_for_another_node(self, one: Node) -> None:
        assert Node(THREE).hear(one.hello(TWO, 0.0), NAT) is None

    def test_our_own_come_back(self, one: Node) -> None:
        assert one.hear(one.hello(TWO, 0.0), NAT) is None

    def test_a_node_with_another_key(self, two: Node) -> None:
        stranger = Node(ONE, key=b"another cluster's")
        assert two.hear(stranger.hello(TWO, 0.0), NAT) is None

    def test_a_node_that_is_no_peer(self, two: Node) -> None:
        two.roaming.remove(ONE)
        two.roaming.remove(ONE)
        assert two.hear(Node(ONE).hello(TWO, 0.0), NAT) is None

    def test_a_response_nobody_asked_for(self, two: Node) -> None:
        forged = Message(RESPONSE, name_of(ONE), name_of(TWO), bytes(8), bytes(8))
        assert two.hear(encode(forged, KEY), NAT) is None


class TestHellos:
    def test_to_each_from_time_to_time(self) -> None:
        roaming = Roaming(ONE, KEY, os.urandom)
        for peer in (TWO, THREE):
            roaming.add(peer, 0.0)
        count = sum(len(roaming.hellos(i * 0.1)) for i in range(600))
        assert count == pytest.approx(2 * 60 / HELLO_SECONDS, abs=4)

    def test_no_more_than_so_many_a_second(self) -> None:
        roaming = Roaming(ONE, KEY, os.urandom)
        for i in range(5000):
            roaming.add(f"n{i}", 0.0)
        said: list[str] = []
        for i in range(200):
            hellos = roaming.hellos(i * 0.1)
            assert len(hellos) <= 128
            said += [peer for peer, _ in hellos]
        assert len(set(said)) == 5000
        assert len(said) / 20 <= 520
