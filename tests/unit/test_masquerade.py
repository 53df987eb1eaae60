"""The text of the masquerading table, and what is said where it cannot be set."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from forwarder import masquerade
from forwarder.masquerade import MasqueradeError
from tests.unit.test_reconcile import WIRING

PORTS = (6081, 4789)


def test_the_table_is_put_in_an_earlier_ones_place() -> None:
    assert masquerade.ruleset(WIRING, PORTS) == (
        "table inet podloom-loom0\n"
        "delete table inet podloom-loom0\n"
        "table inet podloom-loom0 {\n"
        "  chain postrouting {\n"
        "    type nat hook postrouting priority 100; policy accept;\n"
        '    oifname "loom0" accept\n'
        "    udp dport { 4789, 6081 } accept\n"
        "    ip saddr { 10.42.1.0/24 } ip daddr != { 10.42.0.0/16, 224.0.0.0/4 } masquerade fully-random\n"
        "    ip6 saddr { fd42:0:0:1::/64 } ip6 daddr != { fd42::/48, ff00::/8 } masquerade fully-random\n"
        "  }\n"
        "}\n"
    )


def test_every_network_of_the_cluster_is_inside() -> None:
    cidrs = (*WIRING.cluster_cidrs, ip_network("10.50.0.0/16"))
    text = masquerade.ruleset(replace(WIRING, cluster_cidrs=cidrs), PORTS)
    assert "ip daddr != { 10.42.0.0/16, 10.50.0.0/16, 224.0.0.0/4 }" in text


def test_a_host_without_ipv6_gets_no_rule_of_it() -> None:
    text = masquerade.ruleset(replace(WIRING, ipv6_available=False), PORTS)
    assert "ip saddr" in text
    assert "ip6" not in text


@pytest.fixture
def nft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the only nft of this host would be."""
    monkeypatch.setattr(masquerade, "SBIN", "/nonexistent")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nft"


def test_a_host_without_nft_is_told_what_to_do(nft: Path) -> None:
    with pytest.raises(MasqueradeError) as caught:
        masquerade.ensure(WIRING, PORTS)
    assert str(caught.value) == (
        "node.ip_masquerade is true and this host has no nft: install nftables or set "
        "node.ip_masquerade = false"
    )
    masquerade.remove(WIRING)  # There can be none.


def test_what_nft_says_is_passed_on(nft: Path) -> None:
    nft.write_text("#!/bin/sh\necho 'Error: Operation not supported' >&2\necho more >&2\nexit 1\n")
    nft.chmod(0o755)
    with pytest.raises(MasqueradeError) as caught:
        masquerade.ensure(WIRING, PORTS)
    assert str(caught.value).startswith(
        "node.ip_masquerade is true and nft cannot set the table podloom-loom0: "
        "Error: Operation not supported; load the kernel's nf_tables"
    )
    masquerade.remove(WIRING)  # A kernel without tables has not ours.


def test_a_table_that_cannot_be_removed_is_named(nft: Path) -> None:
    nft.write_text(
        "#!/bin/sh\nread text\n"
        '[ "$text" = "list tables inet" ] && echo "table inet podloom-loom0" && exit 0\n'
        "echo 'Error: Device or resource busy' >&2\nexit 1\n"
    )
    nft.chmod(0o755)
    with pytest.raises(MasqueradeError, match="cannot remove the table podloom-loom0: Error: Device or"):
        masquerade.remove(WIRING)
