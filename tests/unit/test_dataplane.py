"""The changes of peers, applied to the fast path's own tables."""

from __future__ import annotations

from dataclasses import asdict
from ipaddress import ip_address
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpath.table import PeerTable, PrefixTable
from forwarder.dataplane import MAX_SLOTS, apply_changes
from forwarder.peers import PeerPath, PeerRecord, SetPath, Tables, diff, tables_for
from tests.unit.peer_histories import ENDPOINTS, PREFIXES, snapshots


class Recorder:
    """In a PeerTable's place: what it was told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def set(self, slot: int, **fields: Any) -> None:
        self.told = {"slot": slot, **fields}


@pytest.mark.parametrize("partial_checksums", [False, True])
def test_each_field_of_a_path_is_told(partial_checksums: bool) -> None:
    endpoint = ip_address("192.0.2.2")
    path = PeerPath("geneve", 7, b"\2\0\0\0\0\2", endpoint, 6081, 1400, partial_checksums)
    peers = Recorder()
    apply_changes([SetPath(1, path)], PrefixTable(), cast(PeerTable, peers))
    told = asdict(path)
    told |= {"slot": 1, "endpoint": endpoint.packed, "mtu": told.pop("mtu_bytes")}
    assert peers.told == told


@given(st.lists(snapshots(), min_size=1, max_size=5))
def test_the_fast_path_takes_every_change(history: list[list[PeerRecord]]) -> None:
    prefixes, peers, tables = PrefixTable(), PeerTable(), Tables()
    for records in history:
        previous = tables
        tables = tables_for(records, previous=previous.slots, mtu_bytes={4: 1450}, max_slots=MAX_SLOTS)
        apply_changes(diff(previous, tables), prefixes, peers)
        assert {prefix: prefixes.lookup(prefix[9].packed) for prefix in PREFIXES} == {
            prefix: tables.prefixes.get(prefix) for prefix in PREFIXES
        }
        assert {endpoint: peers.find_source(endpoint.packed) for endpoint in ENDPOINTS} == {
            endpoint: tables.sources.get(endpoint) for endpoint in ENDPOINTS
        }
