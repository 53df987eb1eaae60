from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from forwarder import config
from forwarder.addresses import derive_mac
from forwarder.config import (
    ClusterConfig,
    DiscoveryConfig,
    HealthConfig,
    LinksConfig,
    NodeConfig,
    OffloadConfig,
    TunnelConfig,
)
from forwarder.faults import ConfigError, Fault
from forwarder.peers import DIRECT, PeerRecord

MINIMAL: dict[str, Any] = {
    "cluster": {"cidrs": ["10.42.0.0/16", "fd42::/48"]},
    "node": {
        "endpoints": ["192.0.2.1", "2001:db8::1"],
        "prefixes": ["10.42.1.0/24", "fd42:0:0:1::/64"],
    },
}

PEER: dict[str, Any] = {
    "id": "b",
    "endpoints": ["192.0.2.2"],
    "router_mac": "02:00:00:00:00:02",
    "prefixes": ["10.42.2.0/24"],
}

SECTIONS: dict[str, type] = {
    "cluster": ClusterConfig,
    "node": NodeConfig,
    "tunnel": TunnelConfig,
    "links": LinksConfig,
    "offload": OffloadConfig,
    "discovery": DiscoveryConfig,
    "health": HealthConfig,
    "peer": PeerRecord,
}


def toml(value: Any) -> str:
    """A value as inline TOML; a dict at the top becomes one line for each key."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def text_of(tables: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {toml(table)}" for name, table in tables.items())


def with_key(tables: Mapping[str, Any], section: str, key: str, value: Any) -> dict[str, Any]:
    if section == "peer":
        return {**tables, "peer": [{**PEER, key: value}]}
    return {**tables, section: {**tables.get(section, {}), key: value}}


def faults_of(text: str) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    return caught.value.faults


def test_minimal_file_gets_the_defaults() -> None:
    parsed = config.parse(text_of(MINIMAL))
    assert parsed.cluster == ClusterConfig((ip_network("10.42.0.0/16"), ip_network("fd42::/48")), vni=1)
    assert parsed.node.endpoints == (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
    assert (parsed.node.id, parsed.node.router_mac) == (None, None)
    assert parsed.tunnel == TunnelConfig("geneve", 6081, (4789,), "strict", False)
    assert parsed.links == LinksConfig("loom0", "loom-tap", "loom-up", 2000, True)
    assert parsed.discovery == DiscoveryConfig("static", Path("/etc/podloom/peers.toml"))
    assert parsed.socket_path == Path("/run/podloom/control.sock")


def test_a_peers_absent_keys_stand_for_ours() -> None:
    ours = with_key(MINIMAL, "cluster", "vni", 7) | {
        "tunnel": {"encapsulation": "vxlan", "vxlan_ports": [8472, 4789]}
    }
    (peer,) = config.parse(text_of({**ours, "peer": [PEER]})).peers
    assert peer == PeerRecord(
        id="b",
        endpoints=(ip_address("192.0.2.2"),),
        port=8472,
        encapsulation="vxlan",
        vni=7,
        router_mac=bytes.fromhex("020000000002"),
        prefixes=(ip_network("10.42.2.0/24"),),
    )
    (peer,) = config.parse(text_of({**ours, "peer": [{**PEER, "encapsulation": "geneve"}]})).peers
    assert (peer.encapsulation, peer.port) == ("geneve", 6081)


def test_a_peers_absent_router_mac_is_the_one_it_derives_itself() -> None:
    unnamed = {key: value for key, value in PEER.items() if key != "router_mac"}
    (peer,) = config.parse(text_of({**MINIMAL, "peer": [unnamed]})).peers
    assert peer.router_mac == derive_mac("b", "router")


def test_example_is_a_sound_file_with_the_defaults() -> None:
    parsed = config.parse(config.example())
    assert (parsed.tunnel, parsed.links, parsed.discovery, parsed.health) == (
        TunnelConfig(),
        LinksConfig(),
        DiscoveryConfig(),
        HealthConfig(),
    )


def test_example_uncommented_is_sound_and_names_every_key() -> None:
    lines = [
        line.removeprefix("#") if not line.startswith("# ") else "" for line in config.example().splitlines()
    ]
    parsed = config.parse("\n".join(lines))
    assert (parsed.tunnel, parsed.links, parsed.discovery, parsed.health) == (
        TunnelConfig(),
        LinksConfig(),
        DiscoveryConfig(),
        HealthConfig(),
    )
    tables = tomllib.loads("\n".join(lines))
    for name, section in SECTIONS.items():
        table = tables[name][0] if name == "peer" else tables[name]
        assert set(table) == {item.name for item in fields(section)}


@pytest.mark.parametrize(
    "text",
    [text_of(MINIMAL), text_of({**MINIMAL, "peer": [PEER]}), config.example()],
    ids=["minimal", "peer", "example"],
)
def test_rendered_file_means_the_same(text: str) -> None:
    parsed = config.parse(text)
    assert config.parse(config.render(parsed)) == parsed


ENDPOINTS = "must be a list of one IPv4 address, one IPv6 address, or one of each"
VNI = "must be an integer from 0 to 16777215"
PORT = "must be an integer from 1 to 65535"
MAC = 'must be a unicast MAC such as "02:00:00:00:00:01"'
LINK_NAME = "must be 1 to 15 of A-Z a-z 0-9 _ . -"
NODE_ID = "must be 1 to 63 of A-Z a-z 0-9 _ . -"
ENCAPSULATION = 'must be "geneve" or "vxlan"'
FRAMES = "must be an integer from 16 to 65536"
MTU = "must be 0 or an integer from 646 to 65535"
UNDERLAY = "must be an underlay address, outside cluster.cidrs"

# section, key, value; then what the fault must name: where in the value, and what is allowed
FAULTS: list[tuple[str, str, Any, str, str]] = [
    ("cluster", "cidrs", [], "", "must be a list of the networks that all pods' addresses are from"),
    ("cluster", "cidrs", "10.42.0.0/16", "", "must be a list of the networks"),
    ("cluster", "cidrs", ["10.42.1.0/16"], "[0]", "no host bits set; did you mean 10.42.0.0/16?"),
    ("cluster", "cidrs", ["ten"], "[0]", "must be a network such as"),
    ("cluster", "cidrs", [10], "[0]", "must be a network"),
    ("cluster", "cidrs", ["0.0.0.0/0"], "[0]", "must not overlap 0.0.0.0/8, which is not for unicast"),
    ("cluster", "cidrs", ["169.254.0.0/16"], "[0]", "must not overlap 169.254.0.0/16"),
    ("cluster", "cidrs", ["ff00::/8"], "[0]", "must not overlap ff00::/8"),
    ("cluster", "cidrs", ["10.42.0.0/16"] * 2, "[1]", "must not be listed twice"),
    (
        "cluster",
        "cidrs",
        ["10.0.0.0/8", "10.42.0.0/16", "fd42::/48"],
        "[1]",
        "must not overlap 10.0.0.0/8 of",
    ),
    ("health", "interval_seconds", 0, "", "must be an integer from 1 to 60"),
    ("health", "detect_multiplier", 1, "", "must be an integer from 2 to 50"),
    ("health", "key_file", "key", "", 'must be an absolute path, or ""'),
    ("cluster", "vni", 16777216, "", VNI),
    ("cluster", "vni", True, "", VNI),
    ("cluster", "vni", "1", "", VNI),
    ("node", "endpoints", [], "", ENDPOINTS),
    ("node", "device", "a/b", "", 'must be a network device, "auto", or ""'),
    ("node", "endpoints", ["192.0.2.1", "192.0.2.2"], "", ENDPOINTS),
    ("node", "endpoints", ["host"], "[0]", "must be an IP address"),
    ("node", "endpoints", ["127.0.0.1"], "[0]", "must be a global or private unicast address"),
    ("node", "endpoints", ["192.0.2.1", "fe80::1"], "[1]", "must be a global or private unicast address"),
    ("node", "endpoints", ["10.42.9.9"], "[0]", UNDERLAY),
    ("node", "prefixes", [], "", "must be a list of the networks that this node's pods get addresses from"),
    ("node", "prefixes", ["10.43.1.0/24"], "[0]", "must lie inside one of cluster.cidrs"),
    ("node", "prefixes", ["10.42.1.0/31"], "[0]", "must be /30 or shorter"),
    ("node", "prefixes", ["10.42.1.0/24", "10.42.1.128/25"], "[1]", "must not overlap 10.42.1.0/24 of node"),
    ("node", "id", "a b", "", NODE_ID),
    ("node", "id", "", "", NODE_ID),
    ("node", "id", 7, "", NODE_ID),
    ("node", "router_mac", "01:00:5e:00:00:01", "", MAC + "; this is a group address"),
    ("node", "router_mac", "2:0:0:0:0:1", "", MAC + "; this is not six colon-separated bytes"),
    ("node", "router_mac", "00:00:00:00:00:00", "", MAC + "; this is all zero"),
    ("node", "state_dir", "var", "", "must be an absolute path"),
    ("node", "run_dir", "/" + "r" * 94, "", "must be at most 94 bytes: a socket's path is limited"),
    ("node", "ip_masquerade", "yes", "", "must be true or false"),
    ("tunnel", "encapsulation", "gre", "", ENCAPSULATION),
    ("tunnel", "geneve_port", 0, "", PORT),
    ("tunnel", "geneve_port", 4789, "", "must not be one of tunnel.vxlan_ports"),
    ("tunnel", "vxlan_ports", 4789, "", "must be a list of at most 3 UDP ports"),
    ("tunnel", "vxlan_ports", [1, 2, 3, 4], "", "must be a list of at most 3 UDP ports"),
    ("tunnel", "vxlan_ports", [4789, 70000], "[1]", PORT),
    ("tunnel", "vxlan_reserved_bits", "loose", "", 'must be "strict" or "rfc"'),
    ("tunnel", "underlay_mtu_bytes", 100, "", MTU),
    ("tunnel", "underlay_mtu_bytes", -1, "", MTU),
    ("links", "bridge", "loom0/x", "", LINK_NAME),
    ("links", "bridge", "..", "", LINK_NAME),
    ("links", "tap", "loom0", "", "must differ from links.bridge"),
    ("links", "tap", "sixteen-bytes-xx", "", LINK_NAME),
    ("links", "tap_queue_frames", 0, "", FRAMES),
    ("links", "keep_on_exit", 1, "", "must be true or false"),
    ("offload", "tso", 1, "", "must be true or false"),
    ("offload", "uplink", True, "", 'must be "auto" or "on" or "off"'),
    ("links", "uplink", "loom0", "", "must differ from links.bridge and links.tap"),
    ("discovery", "source", "gossip", "", 'must be "static"'),
    ("discovery", "file", "peers.toml", "", "must be an absolute path"),
    ("peer", "id", "-b", "", NODE_ID),
    ("peer", "port", 70000, "", PORT),
    ("peer", "encapsulation", "gre", "", ENCAPSULATION),
    ("underlay", "direct", "on", "", 'must be "auto" or "off"'),
    ("underlay", "direct", True, "", 'must be "auto" or "off"'),
    ("underlay", "bfd_port", 0, "", PORT),
    ("bgp", "include", "podloom.conf", "", 'must be an absolute path, or ""'),
    ("bgp", "control_socket", "", "", "must be an absolute path"),
    ("bgp", "route_protocol", 4, "", "must be an integer from 5 to 255"),
    ("peer", "encapsulation", ["geneve"], "", ENCAPSULATION),
    ("peer", "vni", -1, "", VNI),
    ("peer", "endpoints", ["192.0.2.1"], "[0]", "is this node's own; must be another node's address"),
    ("peer", "endpoints", ["10.42.7.7"], "[0]", UNDERLAY),
    ("peer", "prefixes", [], "", "must be a list of the networks that the peer's pods get addresses from"),
    ("peer", "prefixes", ["10.43.0.0/24"], "[0]", "must lie inside one of cluster.cidrs"),
    ("peer", "prefixes", ["10.42.1.128/25"], "[0]", "must not overlap 10.42.1.0/24 of node.prefixes"),
    ("peer", "prefixes", ["10.42.0.0/16"], "[0]", "must not overlap 10.42.1.0/24 of node.prefixes"),
]


@pytest.mark.parametrize(
    ("section", "key", "value", "where", "allowed"),
    FAULTS,
    ids=[f"{section}.{key}={json.dumps(value):.20}" for section, key, value, _, _ in FAULTS],
)
def test_a_fault_names_key_value_and_what_is_allowed(
    section: str, key: str, value: Any, where: str, allowed: str
) -> None:
    (fault,) = faults_of(text_of(with_key(MINIMAL, section, key, value)))
    path = "peer[0]" if section == "peer" else section
    assert fault.key == f"{path}.{key}{where}"
    wrong = value[int(where.strip("[]"))] if where else value
    assert json.loads(json.dumps(fault.value, default=str)) == wrong
    assert allowed in fault.allowed
    assert str(fault).startswith(f"{path}.{key}{where} = {json.dumps(wrong):.60}")


@pytest.mark.parametrize(
    ("extra", "key", "says"),
    [
        ("[tunel]", "tunel", "did you mean tunnel?"),
        ("[tunnel]\nencapsulatoin = 1", "tunnel.encapsulatoin", "did you mean encapsulation?"),
        ("[tunnel]\nx = 1", "tunnel.x", "allowed here: encapsulation, geneve_port, vxlan_ports"),
        ("[[peers]]\nid = 'b'", "peers", "did you mean peer?"),
    ],
)
def test_an_unknown_key_is_refused(extra: str, key: str, says: str) -> None:
    (fault,) = faults_of(text_of(MINIMAL) + "\n" + extra)
    assert fault.key == key
    assert fault.allowed.startswith("is not a key podloom knows")
    assert says in fault.allowed


def test_a_device_stands_for_endpoints() -> None:
    node = {key: value for key, value in MINIMAL["node"].items() if key != "endpoints"}
    for device in ("auto", "bond0.100", "wlan-1"):
        parsed = config.parse(text_of({**MINIMAL, "node": {**node, "device": device}, "peer": [PEER]}))
        assert (parsed.node.endpoints, parsed.node.device) == ((), device)
        assert config.parse(config.render(parsed)) == parsed
    (fault,) = faults_of(text_of({**MINIMAL, "node": {**node, "device": ""}}))
    assert (fault.key, "node.device" in fault.allowed) == ("node.endpoints", True)
    (fault,) = faults_of(text_of(with_key(MINIMAL, "node", "device", "eth0")))
    assert (fault.key, fault.allowed) == ("node.device", "must be left out where node.endpoints is given")


def test_what_is_missing_is_named() -> None:
    assert [str(fault).split(":")[0] for fault in faults_of("[[peer]]")] == [
        "cluster.cidrs is missing",
        "node.endpoints is missing",
        "node.prefixes is missing",
        "peer[0].id is missing",
        "peer[0].endpoints is missing",
        "peer[0].prefixes is missing",
    ]


def test_all_faults_are_reported_at_once() -> None:
    tables = {**MINIMAL, "peer": [PEER]}
    for section, key, value in (
        ("cluster", "vni", -1),
        ("node", "id", ""),
        ("tunnel", "encapsulation", "gre"),
        ("links", "keep_on_exit", 1),
        ("discovery", "source", "gossip"),
        ("peer", "port", 0),
        ("tunel", "x", 1),
    ):
        tables = with_key(tables, section, key, value)
    assert [fault.key for fault in faults_of(text_of(tables))] == [
        "cluster.vni",
        "node.id",
        "tunnel.encapsulation",
        "links.keep_on_exit",
        "discovery.source",
        "peer[0].port",
        "tunel",
    ]


def test_not_toml_names_the_line() -> None:
    (fault,) = faults_of("[cluster]\ncidrs = [\n[node]")
    assert str(fault).startswith("must be TOML: ")
    assert "line 3" in str(fault)


def test_absurd_nesting_is_refused_not_fatal() -> None:
    (fault,) = faults_of("x = " + "[" * 5000 + "]" * 5000)
    assert str(fault).startswith("must be TOML: ")


def test_vxlan_needs_a_port() -> None:
    (fault,) = faults_of(text_of({**MINIMAL, "tunnel": {"encapsulation": "vxlan", "vxlan_ports": []}}))
    assert str(fault).startswith("tunnel.vxlan_ports = []: must hold a port")


def test_a_node_announces_what_it_can_do() -> None:
    assert DIRECT not in config.parse(text_of(MINIMAL)).features
    direct = config.parse(text_of({**MINIMAL, "underlay": {"direct": "auto"}}))
    assert DIRECT in direct.features


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        config.load(tmp_path / "latin.toml")


def test_peers_file_holds_peers_only() -> None:
    parsed = config.parse(text_of(MINIMAL))
    text = text_of({"peer": [PEER]})
    assert [peer.id for peer in config.parse_peers(text, parsed)] == ["b"]
    with pytest.raises(ConfigError, match=r"^node = .*allowed here: peer$"):
        config.parse_peers(text + "\n[node]\nid='x'", parsed)


SOUND: dict[str, list[Any]] = {
    "cluster": [],
    "node": [],
    "tunnel": [{}],
    "links": [{}],
    "offload": [{}],
    "discovery": [{}],
    "health": [{}],
    "peer": [[]],
}
"""Of the shapes tried below, those that are a configuration."""


@pytest.mark.parametrize("value", [1, "x", [], {}, 1.5, True, [[]], [{}], {"x": {}}], ids=str)
@pytest.mark.parametrize("section", SECTIONS)
def test_no_shape_of_value_breaks_the_reader(section: str, value: Any) -> None:
    """Whatever stands in a section's place or in all its keys, the answer is faults or a configuration."""
    filled: Any = {item.name: value for item in fields(SECTIONS[section])}
    for candidate in (value, [filled] if section == "peer" else filled):
        text = text_of({**MINIMAL, "peer": [PEER], section: candidate})
        if toml(candidate) in map(toml, SOUND[section]):  # by text: 1 == True
            assert config.parse(text)
        else:
            assert faults_of(text)
