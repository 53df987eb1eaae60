from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest

from forwarder.addresses import Network
from forwarder.discovery.pools import NoPrefixError, choose

LENGTHS = {4: 24, 6: 64}
CIDRS = (ip_network("10.42.0.0/16"), ip_network("fd42::/48"))


def test_one_of_each_network_and_the_same_again() -> None:
    chosen = choose(CIDRS, LENGTHS, (), "a")
    assert [prefix.prefixlen for prefix in chosen] == [24, 64]
    assert all(prefix.subnet_of(cidr) for prefix, cidr in zip(chosen, CIDRS, strict=True))  # type: ignore[arg-type]
    assert choose(CIDRS, LENGTHS, (), "a") == chosen
    assert choose(CIDRS, LENGTHS, (), "b") != chosen


def test_all_are_found_whoever_asks_and_then_none() -> None:
    cidr = ip_network("10.42.0.0/20")
    taken: list[Network] = []
    for number in range(16):
        (prefix,) = choose([cidr], LENGTHS, taken, f"n{number}")
        assert not any(prefix.overlaps(other) for other in taken)
        taken.append(prefix)
    with pytest.raises(NoPrefixError, match=r"all 16 prefixes of 10.42.0.0/20 that are /24 are taken"):
        choose([cidr], LENGTHS, taken, "late")


@pytest.mark.parametrize("free", range(4))
@pytest.mark.parametrize("node_id", ["a", "b", "c", "d"])
def test_the_only_free_one_is_found(free: int, node_id: str) -> None:
    cidr = IPv4Network("10.42.0.0/22")
    subnets: list[Network] = list(cidr.subnets(new_prefix=24))
    taken = [other for other in subnets if other != subnets[free]]
    assert choose([cidr], LENGTHS, taken, node_id) == (subnets[free],)


def test_taken_ones_of_other_lengths_count() -> None:
    cidr = ip_network("10.42.0.0/22")
    taken = [ip_network("10.42.0.0/23"), ip_network("10.42.2.7/32"), ip_network("10.0.0.0/24")]
    assert choose([cidr], LENGTHS, taken, "a") == (ip_network("10.42.3.0/24"),)
    with pytest.raises(NoPrefixError):
        choose([cidr], LENGTHS, [ip_network("10.0.0.0/8")], "a")


def test_a_network_that_is_one_prefix() -> None:
    assert choose([ip_network("10.42.7.0/24")], LENGTHS, (), "a") == (ip_network("10.42.7.0/24"),)
