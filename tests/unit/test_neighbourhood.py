"""Peers that are found elsewhere than their records say: what the fast path holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from fastpath.table import PeerTable, PrefixTable
from forwarder.addresses import Address
from forwarder.dataplane import DataPlane, apply_changes
from forwarder.kernel_routes import RouteKeeper
from forwarder.neighbourhood import Neighbourhood
from forwarder.peers import Change, Local, PeerRecord, SetPath
from forwarder.probing import Probing
from forwarder.reconcile import Wiring
from forwarder.roaming import Roaming
from tests.unit.test_peers import peer

CIDR = ip_network("10.42.0.0/16")
NAT = ip_address("203.0.113.9")


def record(number: int, **more: Any) -> PeerRecord:
    sound = peer(number, prefixes=(ip_network(f"10.42.{number}.0/24"),), features=("health", "roaming"))
    return replace(sound, **more)


class FastPath:
    """In a DataPlane's place: its tables, without sockets."""

    def __init__(self) -> None:
        self.prefixes, self.peers = PrefixTable(), PeerTable()
        self.paths: dict[int, Any] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        changes = tuple(changes)
        apply_changes(changes, self.prefixes, self.peers)
        self.paths.update((change.slot, change.path) for change in changes if isinstance(change, SetPath))

    def owner_of(self, address: Address) -> int | None:
        return self.peers.find_source(address.packed)


class Hood:
    """A neighbourhood, and what came of it in the fast path."""

    def __init__(self) -> None:
        local = Local("n1", bytes([2, 0, 0, 0, 0, 1]), (ip_address("192.0.2.1"),), (), (CIDR,))
        wiring = Wiring(
            node_id="n1",
            bridge="loom0",
            tap="loom-tap",
            tap_queue_frames=2000,
            mtu_bytes=1450,
            router_mac=bytes([2, 0, 0, 0, 0, 1]),
            gateway_mac=bytes([2, 0, 0, 0, 1, 1]),
            prefixes=(ip_network("10.42.1.0/24"),),
            cluster_cidrs=(CIDR,),
            ipv6_available=False,
            bridge_netfilter=False,
        )
        self.fast = FastPath()
        self.roaming = Roaming("n1", bytes(32), bytes)
        dataplane = cast(DataPlane, self.fast)
        self.near = Neighbourhood(
            local,
            ("health", "roaming"),
            {4: 1450},
            wiring,
            dataplane,
            Probing(dataplane, interval_seconds=1, detect_multiplier=3),
            cast(RouteKeeper, None),  # no path is short here
            self.roaming,
            changed=lambda: None,
        )
        for number in (2, 3):
            self.near.upsert(f"n{number}", record(number))

    def reached(self, node_id: str) -> tuple[str, int, bool]:
        """Address and port that the fast path sends to, and whether from home."""
        path = self.near.path_to(node_id)
        assert path is not None
        slot = self.fast.owner_of(path.endpoint)
        assert slot is not None
        assert self.near.in_slot(slot) == node_id
        assert path == self.fast.paths[slot]
        return str(path.endpoint), path.port, path.from_home


@pytest.fixture
def hood() -> Hood:
    return Hood()


def test_a_peer_moves_and_comes_home(hood: Hood) -> None:
    assert hood.reached("n2") == ("192.0.2.2", 6081, False)
    hood.near.move("n2", (NAT, 40_000))
    assert hood.reached("n2") == (str(NAT), 40_000, True)
    assert hood.near.places_of("n2") == ((NAT, 40_000),)
    hood.near.move("n2", (NAT, 40_001))
    assert hood.reached("n2") == (str(NAT), 40_001, True)
    hood.near.move("n2", (ip_address("192.0.2.2"), 6081))
    assert hood.reached("n2") == ("192.0.2.2", 6081, False)
    assert hood.fast.owner_of(NAT) is None
    assert hood.reached("n3") == ("192.0.2.3", 6081, False)


def test_what_is_of_the_peer_still_comes_from_where_it_was(hood: Hood) -> None:
    """Until its last datagrams from there have come."""
    hood.near.move("n2", (NAT, 40_000))
    slot = hood.fast.owner_of(NAT)
    assert hood.fast.owner_of(ip_address("192.0.2.2")) == slot


def test_nobody_gets_anothers_address(hood: Hood) -> None:
    hood.near.move("n2", (ip_address("192.0.2.3"), 6081))
    assert hood.reached("n2") == ("192.0.2.2", 6081, False)
    hood.near.move("n2", (NAT, 40_000))
    hood.near.move("n3", (NAT, 40_001))
    assert hood.reached("n2") == (str(NAT), 40_000, True)
    assert hood.reached("n3") == ("192.0.2.3", 6081, False)


def test_nor_one_that_we_cannot_send_to(hood: Hood) -> None:
    hood.near.move("n2", (ip_address("2001:db8::2"), 6081))
    assert hood.reached("n2") == ("192.0.2.2", 6081, False)


def test_nor_one_who_has_gone(hood: Hood) -> None:
    hood.near.move("n2", (NAT, 40_000))
    hood.near.remove("n2")
    assert hood.fast.owner_of(NAT) is None
    hood.near.move("n2", (NAT, 40_000))
    assert hood.near.path_to("n2") is None
    assert hood.near.places_of("n2") == ()


def test_a_record_that_says_otherwise_stands(hood: Hood) -> None:
    hood.near.move("n2", (NAT, 40_000))
    hood.near.upsert("n2", record(2, endpoints=(ip_address("192.0.2.22"),)))
    assert hood.reached("n2") == ("192.0.2.22", 6081, False)
    assert hood.fast.owner_of(NAT) is None


def test_a_record_that_says_the_same_changes_nothing(hood: Hood) -> None:
    hood.near.move("n2", (NAT, 40_000))
    hood.near.upsert("n2", record(2, prefixes=(ip_network("10.42.200.0/24"),)))
    assert hood.reached("n2") == (str(NAT), 40_000, True)


def test_a_record_s_own_address_is_its_own(hood: Hood) -> None:
    """Another peer was found there before; it has to be found anew."""
    hood.near.move("n2", (NAT, 40_000))
    hood.near.upsert("n4", record(4, endpoints=(NAT,)))
    assert hood.reached("n4") == (str(NAT), 6081, False)
    assert hood.reached("n2") == ("192.0.2.2", 6081, False)


def test_who_did_not_agree_is_not_looked_for() -> None:
    hood = Hood()
    hood.near.upsert("n2", record(2, features=()))
    assert [peer for peer, _ in hood.roaming.hellos(1e9)] == ["n3"]
