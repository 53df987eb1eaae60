from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.addresses import Address, Network
from forwarder.peers import (
    AllowSource,
    Change,
    ClearSlot,
    ForgetSource,
    InsertPrefix,
    Local,
    PeerPath,
    PeerRecord,
    RemovePrefix,
    SetPath,
    Tables,
    TooManyPeersError,
    check,
    diff,
    tables_for,
)
from tests.unit.peer_histories import snapshots

LOCAL = Local(
    id="a",
    router_mac=bytes.fromhex("02000000000a"),
    endpoints=(ip_address("192.0.2.1"),),
    prefixes=(ip_network("10.42.1.0/24"), ip_network("fd42:0:0:1::/64")),
    cluster_cidrs=(ip_network("10.42.0.0/16"), ip_network("fd42::/48")),
)


def peer(number: int, **changed: Any) -> PeerRecord:
    """Peer `number` (2 to 200), sound as it is."""
    record = PeerRecord(
        id=f"n{number}",
        endpoints=(ip_address(f"192.0.2.{number}"),),
        port=6081,
        encapsulation="geneve",
        vni=1,
        router_mac=bytes([2, 0, 0, 0, 0, number]),
        prefixes=(ip_network(f"10.42.{number}.0/24"), ip_network(f"fd42:0:0:{number:x}::/64")),
    )
    return replace(record, **changed)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ip_network, texts))


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        ([peer(2, id="a")], 'peer[0].id = "a": is this node\'s own id; must name another node'),
        (
            [peer(10, router_mac=LOCAL.router_mac)],
            "peer[0].router_mac = \"02:00:00:00:00:0a\": is this node's own; must be another node's",
        ),
        (
            [peer(2, endpoints=addresses("192.0.2.1"))],
            "peer[0].endpoints[0] = \"192.0.2.1\": is this node's own; must be another node's address",
        ),
        (
            [peer(2, endpoints=addresses("192.0.2.2", "fd42::9"))],
            'peer[0].endpoints[1] = "fd42::9": must be an underlay address, outside cluster.cidrs',
        ),
        (
            [peer(2, endpoints=addresses("2001:db8::2"))],
            'peer[0].endpoints = ["2001:db8::2"]: must hold an IPv4 address, as node.endpoints does',
        ),
        (
            [peer(2), peer(3, id="n2")],
            'peer[1].id = "n2": must be unique; peer[0] has it',
        ),
        (
            [peer(2), peer(3, endpoints=addresses("192.0.2.2"))],
            'peer[1].endpoints[0] = "192.0.2.2": must be one peer\'s only; peer[0] has it',
        ),
        (
            [peer(2), peer(3, prefixes=networks("10.42.2.128/25"))],
            'peer[1].prefixes[0] = "10.42.2.128/25": must not overlap 10.42.2.0/24 of peer[0].prefixes[0]',
        ),
        (
            [peer(2, prefixes=networks("10.42.2.0/24", "10.42.2.0/25"))],
            'peer[0].prefixes[1] = "10.42.2.0/25": must not overlap 10.42.2.0/24 of peer[0].prefixes[0]',
        ),
        (
            [peer(2, prefixes=networks("10.42.1.64/26"))],
            'peer[0].prefixes[0] = "10.42.1.64/26": must not overlap 10.42.1.0/24 of node.prefixes',
        ),
        (
            [peer(2, prefixes=networks("fd42::/48"))],
            'peer[0].prefixes[0] = "fd42::/48": must not overlap fd42:0:0:1::/64 of node.prefixes',
        ),
        (
            [peer(2, prefixes=networks("10.0.0.0/8"))],
            'peer[0].prefixes[0] = "10.0.0.0/8": must lie inside one of cluster.cidrs',
        ),
    ],
)
def test_impossible_records_are_named(records: list[PeerRecord], fault: str) -> None:
    assert fault in [str(found) for found in check(records, LOCAL)]


def test_sound_records_have_no_fault() -> None:
    assert check([peer(2), peer(3), peer(4)], LOCAL) == []


def test_every_overlap_is_found_also_behind_a_nested_one() -> None:
    records = [
        peer(2, prefixes=networks("10.42.4.0/22")),
        peer(3, prefixes=networks("10.42.4.0/24")),
        peer(4, prefixes=networks("10.42.7.0/24")),
    ]
    assert [fault.key for fault in check(records, LOCAL)] == ["peer[1].prefixes[0]", "peer[2].prefixes[0]"]


def test_a_peer_in_both_families_is_reached_by_the_first_we_have() -> None:
    both = peer(2, endpoints=addresses("2001:db8::2", "192.0.2.2"))
    only4 = tables_for([both], previous={}, mtu_bytes={4: 1450}, max_slots=8)
    assert (str(only4.paths[1].endpoint), only4.paths[1].mtu_bytes) == ("192.0.2.2", 1450)
    dual = tables_for([both], previous={}, mtu_bytes={4: 1450, 6: 1430}, max_slots=8)
    assert (str(dual.paths[1].endpoint), dual.paths[1].mtu_bytes) == ("2001:db8::2", 1430)
    assert set(dual.sources) == set(both.endpoints)  # It may send from either.


def test_slots_stay_and_are_reused_only_when_free() -> None:
    def slots(numbers: Iterable[int], previous: Tables) -> Tables:
        return tables_for(map(peer, numbers), previous=previous.slots, mtu_bytes={4: 1450}, max_slots=4)

    first = slots([2, 3, 4], Tables())
    assert first.slots == {"n2": 1, "n3": 2, "n4": 3}
    second = slots([4, 2], first)
    assert second.slots == {"n2": 1, "n4": 3}
    assert slots([5, 4, 2], second).slots == {"n5": 2, "n2": 1, "n4": 3}
    with pytest.raises(TooManyPeersError, match="4 peers: must be at most 3"):
        slots([2, 3, 4, 5], first)


def test_a_changed_value_is_a_change_though_the_id_stays() -> None:
    def tables(record: PeerRecord) -> Tables:
        return tables_for([record], previous={record.id: 1}, mtu_bytes={4: 1450}, max_slots=4)

    moved = peer(2, endpoints=addresses("192.0.2.99"))
    assert diff(tables(peer(2)), tables(moved)) == (
        ForgetSource(IPv4Address("192.0.2.2")),
        SetPath(1, tables(moved).paths[1]),
        AllowSource(IPv4Address("192.0.2.99"), 1),
    )
    assert diff(tables(peer(2)), tables(peer(2))) == ()


def test_a_prefix_that_moves_is_repointed_and_never_absent() -> None:
    moving = ip_network("10.42.9.0/24")
    one, two = peer(2), peer(3)
    before = tables_for(
        [replace(one, prefixes=(moving,)), two], previous={}, mtu_bytes={4: 1450}, max_slots=4
    )
    after = tables_for(
        [one, replace(two, prefixes=(moving,))], previous=before.slots, mtu_bytes={4: 1450}, max_slots=4
    )
    about = [change for change in diff(before, after) if getattr(change, "prefix", None) == moving]
    assert about == [InsertPrefix(moving, 2)]


class FastPath:
    """The tables as the fast path keeps them, with its own refusals; a naive double."""

    def __init__(self) -> None:
        self.paths: dict[int, PeerPath] = {}
        self.sources: dict[Address, int] = {}
        self.prefixes: dict[Network, int] = {}
        self.cleared: list[int] = []

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case ForgetSource(address):
                    del self.sources[address]
                case RemovePrefix(prefix):
                    del self.prefixes[prefix]
                case ClearSlot(slot):
                    del self.paths[slot]
                    self.cleared.append(slot)
                    self.sources = {a: s for a, s in self.sources.items() if s != slot}
                case SetPath(slot, path):
                    self.paths[slot] = path
                case AllowSource(address, slot):
                    assert self.sources.get(address, slot) == slot, "the source is another peer's"
                    assert slot in self.paths, "a source of an empty slot"
                    self.sources[address] = slot
                case InsertPrefix(prefix, slot):
                    assert slot in self.paths, "a prefix of an empty slot"
                    self.prefixes[prefix] = slot


@given(st.lists(snapshots(), min_size=1, max_size=5))
def test_applying_the_differences_gives_the_tables(history: list[list[PeerRecord]]) -> None:
    fast_path, tables = FastPath(), Tables()
    for records in history:
        previous, gone = tables, set(tables.slots) - {record.id for record in records}
        fast_path.cleared.clear()
        tables = tables_for(records, previous=previous.slots, mtu_bytes={4: 1450}, max_slots=8)
        fast_path.apply(diff(previous, tables))
        assert fast_path.paths == tables.paths
        assert fast_path.sources == tables.sources
        assert fast_path.prefixes == tables.prefixes
        assert {node: previous.slots[node] for node in previous.slots if node not in gone} == {
            node: slot for node, slot in tables.slots.items() if node in previous.slots
        }
        # Counters live as long as the peer does.
        assert sorted(fast_path.cleared) == sorted(previous.slots[node] for node in gone)
        assert diff(tables, tables) == ()


def test_ten_thousand_peers_are_checked_and_planned_quickly() -> None:
    """Fifty million comparisons would not end within the test's timeout."""
    records = [
        replace(
            peer(2),
            id=f"n{number}",
            endpoints=(IPv6Address((0x20010DB8 << 96) + number),),
            prefixes=(IPv4Network((0x0A000000 + (number << 8), 24)),),
        )
        for number in range(10_000)
    ]
    local = replace(
        LOCAL,
        endpoints=addresses("2001:db9::1"),
        prefixes=networks("11.0.0.0/24"),
        cluster_cidrs=networks("10.0.0.0/8"),
    )
    assert check(records, local) == []
    tables = tables_for(records, previous={}, mtu_bytes={6: 1430}, max_slots=1 << 16)
    assert len(diff(Tables(), tables)) == 30_000
