from __future__ import annotations

import json
import os
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from forwarder.discovery import stored
from forwarder.peers import PeerRecord
from forwarder.registry import Refusal

PEER = PeerRecord(
    id="b",
    endpoints=(ip_address("192.0.2.2"), ip_address("2001:db8::2")),
    port=8472,
    encapsulation="vxlan",
    vni=7,
    router_mac=bytes.fromhex("020000000002"),
    prefixes=(ip_network("10.42.2.0/24"), ip_network("fd42:0:0:2::/64")),
)
OWN = (ip_network("10.42.1.0/24"),)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = tmp_path / "state"
    stored.write(state, "etcd", 1000.5, OWN, [PEER])
    read = stored.read(state, "etcd")
    assert read is not None
    assert (read.saved_at, read.prefixes) == (1000.5, OWN)
    assert list(read.said.values()) == [PEER]
    assert [path.name for path in state.iterdir()] == ["peers.json"]


def test_another_sources_peers_are_not_ours(tmp_path: Path) -> None:
    stored.write(tmp_path, "etcd", 1.0, OWN, [PEER])
    assert stored.read(tmp_path, "static") is None


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"version": 2, "source": "etcd"}',
        b'{"version": 1, "source": "etcd"}',
        b'{"version": 1, "source": "etcd", "saved_at": 1, "prefixes": ["x"], "peers": []}',
        b'{"version": 1, "source": "etcd", "saved_at": 1, "prefixes": [], "peers": [7]}',
        b'{"version": 1, "source": "etcd", "saved_at": 1, "prefixes": [], "peers": 7}',
        b"[" * 100_000,
    ],
    ids=lambda junk: repr(junk[:60]),
)
def test_junk_is_no_memory(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "peers.json").write_bytes(junk)
    assert stored.read(tmp_path, "etcd") is None


def test_a_faulty_record_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    stored.write(tmp_path, "etcd", 1.0, OWN, [PEER, PEER])
    path = tmp_path / "peers.json"
    table = json.loads(path.read_text())
    table["peers"][0]["port"] = "many"
    path.write_text(json.dumps(table))
    read = stored.read(tmp_path, "etcd")
    assert read is not None
    refusal, record = read.said.values()
    assert isinstance(refusal, Refusal)
    assert str(refusal.faults[0]).startswith('peers.json: peer[0].port = "many"')
    assert record == PEER


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    stored.write(tmp_path, "etcd", 1.0, OWN, [PEER])
    before = (tmp_path / "peers.json").read_bytes()
    os.mkdir(tmp_path / "peers.new")  # noqa: PTH102 (in the temporary file's place)
    with pytest.raises(OSError, match="directory"):
        stored.write(tmp_path, "etcd", 2.0, OWN, [])
    assert (tmp_path / "peers.json").read_bytes() == before
