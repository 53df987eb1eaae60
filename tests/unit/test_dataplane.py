"""The changes of peers, applied to the fast path's own tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastpath.table import PeerTable, PrefixTable
from forwarder.dataplane import MAX_SLOTS, apply_changes
from forwarder.peers import PeerRecord, Tables, diff, tables_for
from tests.unit.peer_histories import ENDPOINTS, PREFIXES, snapshots


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
