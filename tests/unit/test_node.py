from __future__ import annotations

from pathlib import Path

import pytest

from forwarder import config
from forwarder.addresses import derive_mac, format_mac, parse_mac
from forwarder.node import ID_FILE, IdentityError, gateway_mac, identify, stored_id

TEXT = """
[cluster]
cidrs = ["10.42.0.0/16"]
[node]
endpoints = ["192.0.2.1"]
prefixes = ["10.42.1.0/24"]
"""


def test_an_id_is_made_once_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "var" / "lib"
    made = stored_id(directory)
    assert config.is_node_id(made)
    assert stored_id(directory) == made
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in directory.iterdir()] == [ID_FILE]
    assert stored_id(tmp_path / "other") != made


@pytest.mark.parametrize("content", [b"", b"a b\n", b"\xff\n", b"../etc\n"])
def test_a_damaged_id_is_refused_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ID_FILE).write_bytes(content)
    with pytest.raises(IdentityError, match=ID_FILE):
        stored_id(tmp_path)
    assert (tmp_path / ID_FILE).read_bytes() == content


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match=r"set node\.id or repair it"):
        stored_id(tmp_path / "file" / "state")


def test_macs_follow_from_the_id_alone() -> None:
    macs = {derive_mac(node, role) for node in ("a", "b") for role in ("router", "gateway")}
    assert len(macs) == 4
    assert all(mac[0] & 0b11 == 0b10 for mac in macs), "locally administered, unicast"
    assert derive_mac("a", "gateway") == gateway_mac("a")
    assert format_mac(derive_mac("a", "router")) == "92:43:c5:db:58:b6", (
        "peers' records hold it: it must not change"
    )


def test_what_the_file_says_wins(tmp_path: Path) -> None:
    text = TEXT + f'state_dir = "{tmp_path}"\n'
    named = identify(config.parse(text + 'id = "a"\nrouter_mac = "02:00:00:00:00:01"\n'))
    assert (named.node.id, named.node.router_mac) == ("a", parse_mac("02:00:00:00:00:01"))
    assert list(tmp_path.iterdir()) == []
    stored = identify(config.parse(text))
    assert stored.node.id == stored_id(tmp_path)
    assert stored.node.router_mac == derive_mac(stored_id(tmp_path), "router")
