from __future__ import annotations

import itertools
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from forwarder.addresses import Address, Network
from forwarder.bfd import Packet, State
from forwarder.legs import (
    CALM_SECONDS,
    FIRST_HOLD_SECONDS,
    LONGEST_HOLD_SECONDS,
    MAX_DIRECT_PEERS,
    Damping,
    Hop,
    Leg,
    Legs,
    NextHop,
    Way,
    covered,
    describe_ways,
    next_hop,
)
from forwarder.peers import DIRECT, PeerRecord

V4, V6 = ip_address("192.0.2.2"), ip_address("2001:db8::2")
BY4, BY6 = NextHop(V4, "eth0"), NextHop(V6, "eth1")
ROUTED = "192.0.2.2 is on another segment, reached by way of 192.0.2.254"
NONE = frozenset[Network]()


def record(number: int = 2, *endpoints: Address) -> PeerRecord:
    return PeerRecord(
        id=f"n{number:04}",
        endpoints=endpoints or (V4, V6),
        port=6081,
        encapsulation="geneve",
        vni=1,
        router_mac=bytes([2, 0, 0, 0, 0, 2]),
        prefixes=(
            ip_network((0x0A2A0000 + (number << 4), 28)),
            ip_network(f"fd42:0:0:{number:x}::/64"),
        ),
        features=(DIRECT,),
    )


def legs() -> Legs:
    numbers = itertools.count(1)
    return Legs((4, 6), lambda: next(numbers))


@pytest.mark.parametrize(
    ("reached", "ipv4", "ipv6"),
    [
        ({V4: BY4, V6: BY6}, BY4, BY6),
        ({V4: BY4}, BY4, "its IPv6 prefixes need an IPv6 endpoint on both nodes"),
        ({V6: BY6}, BY6, BY6),
        ({V4: ROUTED, V6: BY6}, BY6, BY6),
        ({V4: BY4, V6: "there is no route"}, BY4, "there is no route"),
        ({V4: ROUTED, V6: "there is no route"}, ROUTED, "there is no route"),
    ],
    ids=["both", "IPv4 only", "IPv6 only", "IPv4 routed", "IPv6 unreachable", "none on-link"],
)
def test_the_next_hop(
    reached: dict[Address, NextHop | str], ipv4: NextHop | str, ipv6: NextHop | str
) -> None:
    assert next_hop(4, record(), reached) == ipv4
    assert next_hop(6, record(), reached) == ipv6


def test_a_path_is_used_at_once_and_left_at_once() -> None:
    damping = Damping()
    damping.update(0.0, up=False)
    assert not damping.used
    damping.update(1.0, up=True)
    assert damping.used
    damping.update(2.0, up=False)
    assert not damping.used


def hold_after(damping: Damping, now: float) -> float:
    """Let it fail once more, and come back: how long until it is used."""
    damping.update(now, up=False)
    damping.update(now, up=True)
    hold = damping.hold_left(now)
    if hold:
        damping.update(now + hold - 0.01, up=True)
        assert not damping.used
    damping.update(now + hold, up=True)
    assert damping.used
    return hold


def test_a_path_that_fails_often_is_used_later_and_later() -> None:
    damping, now, holds = Damping(), 0.0, []
    damping.update(now, up=True)
    for _ in range(8):
        holds.append(hold_after(damping, now))
        now += holds[-1] + 1
    assert holds == [2, 4, 8, 16, 32, 60, 60, 60]
    assert (holds[0], holds[-1]) == (FIRST_HOLD_SECONDS, LONGEST_HOLD_SECONDS)
    assert hold_after(damping, now + CALM_SECONDS) == FIRST_HOLD_SECONDS


def test_the_hold_begins_anew_when_the_path_fails_meanwhile() -> None:
    damping = Damping()
    damping.update(0.0, up=True)
    damping.update(1.0, up=False)
    damping.update(2.0, up=True)
    damping.update(3.0, up=False)
    damping.update(3.5, up=True)
    damping.update(5.4, up=True)
    assert not damping.used
    damping.update(5.5, up=True)
    assert damping.used, "it was not used meanwhile, so that did not count as another failure"


def test_many_failures_do_not_overflow() -> None:
    damping = Damping()
    now = 0.0
    for _ in range(2000):
        now += hold_after(damping, now)
    assert damping.used


def test_who_can_be_reached_gets_a_leg_for_each_family() -> None:
    node = legs()
    assert node.look([record()], {V4: BY4, V6: BY6}, NONE)
    assert [(leg.next_hop, str(leg.gateway)) for leg in node] == [
        (BY4, "10.42.0.33"),
        (BY6, "fd42:0:0:2::1"),
    ]
    assert node.find(ip_address("10.42.0.33")) is next(iter(node))
    assert not node.look([record()], {V4: BY4, V6: BY6}, NONE)
    kept = list(node)
    assert node.look([record()], {V4: BY4}, NONE)
    assert list(node) == kept[:1], "what stays keeps its session"
    assert node.look([record()], {V4: replace(BY4, link="eth9")}, NONE)
    assert list(node) != kept[:1]
    assert node.look([], {}, NONE)
    assert list(node) == []
    assert node.find(ip_address("10.42.0.33")) is None


def test_a_family_that_is_not_ours_has_no_leg() -> None:
    node = Legs((4,), lambda: 1)
    node.look([record()], {V4: BY4, V6: BY6}, NONE)
    assert [leg.gateway.version for leg in node] == [4]


def test_no_more_peers_than_allowed() -> None:
    peers = [record(number) for number in range(MAX_DIRECT_PEERS + 1)]
    node = legs()
    node.look(peers[::-1], {V4: BY4, V6: BY6}, NONE)
    assert len(list(node)) == 2 * MAX_DIRECT_PEERS
    way = node.way(peers[-1], 4, 0.0)
    assert way == Way("tunnel", f"{MAX_DIRECT_PEERS} other peers are direct")


def test_what_goes_by_bgp_has_no_leg() -> None:
    node = legs()
    node.look([record()], {V4: BY4, V6: BY6}, frozenset(record().prefixes[:1]))
    assert [leg.gateway.version for leg in node] == [6]


def be_up(leg: Leg, now: float) -> None:
    for remote in (State.DOWN, State.UP):
        leg.session.receive(Packet(remote, 0, 9, 0 if remote == State.DOWN else 1, 1, 1), now)
    assert leg.session.state == State.UP


def test_the_ways_and_why() -> None:
    node = Legs((4,), lambda: 1)
    peer = record()
    assert node.way(peer, 4, 0.0).why == "not looked at yet"
    node.look([peer], {V4: ROUTED}, NONE)
    assert node.way(peer, 4, 0.0) == Way("tunnel", ROUTED)
    node.look([peer], {V4: BY4}, NONE)
    (leg,) = node
    assert node.way(peer, 4, 0.0) == Way("tunnel", "direct by eth0: nothing is heard from it")
    leg.session.receive(Packet(State.DOWN, 0, 9, 0, 1, 1), 10.0)
    assert node.way(peer, 4, 11.0) == Way("tunnel", "direct by eth0: it does not hear us")
    assert node.way(peer, 4, 14.0) == Way("tunnel", "direct by eth0: nothing is heard from it")
    be_up(leg, 20.0)
    assert leg.update(20.0, never)
    assert node.way(peer, 4, 20.0) == Way("direct", "on-link by eth0")
    leg.session.receive(Packet(State.DOWN, 0, 9, 0, 1, 1), 21.0)
    assert leg.update(21.0, never)
    be_up(leg, 22.0)
    assert not leg.update(22.0, never)
    assert node.way(peer, 4, 22.0) == Way("tunnel", "direct by eth0 is well again, used in 2 s")
    assert node.way(replace(peer, features=()), 6, 0.0).why == 'its record has not the feature "direct"'


def never() -> bool:
    return False


def test_a_path_that_was_good_is_the_last_resort_where_the_tunnel_is_down_too() -> None:
    def always() -> bool:
        return True

    node = Legs((4,), lambda: 1)
    node.look([record()], {V4: BY4}, NONE)
    (leg,) = node
    assert not leg.update(0.0, always), "it was never proved"
    be_up(leg, 1.0)
    assert leg.update(1.0, never)
    leg.session.receive(Packet(State.DOWN, 0, 9, 0, 1, 1), 2.0)
    assert leg.update(2.0, never)
    assert not leg.used
    assert leg.update(10.0, always)
    assert node.way(record(), 4, 10.0).path == "direct"
    assert leg.update(11.0, never), "the tunnel is back"
    assert not leg.used


def test_the_hops_are_of_all_prefixes_of_a_family() -> None:
    more = ip_network("10.42.99.0/28")
    peer = replace(record(), prefixes=(*record().prefixes, more))
    node = Legs((4,), lambda: 1)
    node.look([peer], {V4: BY4}, NONE)
    assert node.hops({peer.id: peer}) == dict.fromkeys((peer.prefixes[0], more), Hop(BY4, used=False))
    assert node.hops({}) == {}


@pytest.mark.parametrize(
    ("route", "by_bgp"),
    [
        ("10.42.2.0/24", True),
        ("10.42.2.0/23", True),
        ("10.42.0.0/17", True),
        ("10.42.0.0/16", False),
        ("0.0.0.0/0", False),
        ("10.42.2.0/25", False),
        ("10.42.3.0/24", False),
        ("fd42::/64", False),
    ],
    ids=[
        "the prefix",
        "wider",
        "half the cluster",
        "the cluster",
        "default",
        "a part",
        "another",
        "other family",
    ],
)
def test_what_a_routing_daemon_leads_to(route: str, by_bgp: bool) -> None:
    prefix = ip_network("10.42.2.0/24")
    cidrs = [ip_network("10.42.0.0/16"), ip_network("fd42::/48")]
    found = covered([prefix, ip_network("fd42:0:0:2::/64")], {ip_network(route)}, cidrs)
    assert found == ({prefix} if by_bgp else frozenset())


def test_a_clusters_network_that_is_a_prefix_may_go_by_bgp() -> None:
    prefix = ip_network("10.42.2.0/24")
    assert covered([prefix], {prefix}, [prefix]) == {prefix}


def test_the_ways_of_a_peer_are_told_together_and_each() -> None:
    one, other = record().prefixes
    direct, tunnel = Way("direct", "on-link by eth0"), Way("tunnel", "because")
    told = describe_ways({one: direct, other: tunnel})
    assert (told["path"], told["why"]) == ("mixed", "on-link by eth0; because")
    assert told["paths"][str(other)] == {"path": "tunnel", "why": "because"}
    assert describe_ways({one: direct, other: direct})["path"] == "direct"
