"""The operator's file: what may stand in it, what it means, and every default.

`parse` is pure and reports all faults at once; only `load` touches the machine. What the machine must
say (the stored node id, the underlay's MTU) is not filled in here.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from forwarder.addresses import Address, Network, derive_mac, format_mac, parse_mac
from forwarder.control.messages import DEFAULT_RUN_DIR, SOCKET_NAME
from forwarder.faults import MISSING, ConfigError, Fault
from forwarder.health import MAX_PROBES_PER_SECOND
from forwarder.names.options import NAMES, NamesConfig, names_example, read_services
from forwarder.names.records import Service
from forwarder.peers import (
    DIRECT,
    FEATURES,
    HEALTH,
    OPTION_BYTES,
    OVERHEAD_BYTES,
    REMOTE_CHECKSUM,
    ROAMING,
    Local,
    NamedPrefix,
    PeerRecord,
    check,
    is_inside,
    overlaps,
)
from forwarder.roaming import MIN_KEY_BYTES
from forwarder.toml_values import (
    Kind,
    RefusedError,
    integer,
    kind_of,
    list_of,
    matching,
    one_of,
    read_section,
    refuse_unknown,
)
from forwarder.underlay import AUTO

DEFAULT_PATH: Final = Path("/etc/podloom/podloom.toml")
SECTIONS: Final = (
    "cluster",
    "node",
    "tunnel",
    "links",
    "offload",
    "underlay",
    "bgp",
    "discovery",
    "health",
    "names",
)
UPLINK_CHOICES: Final = ("auto", "on", "off")
ENCAPSULATIONS: Final = ("geneve", "vxlan")
MAX_VNI: Final = (1 << 24) - 1
MAX_VXLAN_PORTS: Final = 3
"""With Geneve's, in two IP versions, as many receivers as the pump takes."""

MAX_MTU_BYTES: Final = 65535
MIN_UNDERLAY_MTU_BYTES: Final = 576 + max(OVERHEAD_BYTES.values())
"""Leaves 576 bytes inside, which every IPv4 host must take (RFC 791)."""
LONGEST_GATEWAY_PREFIX: Final = {4: 30, 6: 126}
"""A node's prefix must hold the gateway and a pod besides its first and last address."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    cidrs: tuple[Network, ...]
    vni: int = 1


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`id` and `router_mac` are None when the stored id is to be used and the MAC derived from it; `prefixes`
    are none when the discovery source gives them, and `endpoints` when `device` does."""

    endpoints: tuple[Address, ...] = ()
    device: str = ""
    prefixes: tuple[Network, ...] = ()
    id: str | None = None
    router_mac: bytes | None = None
    state_dir: Path = Path("/var/lib/podloom")
    run_dir: Path = Path(DEFAULT_RUN_DIR)
    ip_masquerade: bool = True


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    encapsulation: str = "geneve"
    geneve_port: int = 6081
    vxlan_ports: tuple[int, ...] = (4789,)
    vxlan_reserved_bits: str = "strict"
    remote_checksum: bool = False
    underlay_mtu_bytes: int = 0

    @property
    def ports(self) -> tuple[int, ...]:
        """The UDP ports on which this node takes datagrams of tunnels."""
        return (self.geneve_port, *self.vxlan_ports)

    def port(self, encapsulation: str) -> int:
        """The UDP port this cluster uses for an encapsulation, when nothing else is said."""
        if encapsulation == "geneve":
            return self.geneve_port
        return self.vxlan_ports[0] if self.vxlan_ports else TunnelConfig().vxlan_ports[0]


@dataclass(frozen=True, slots=True)
class LinksConfig:
    bridge: str = "loom0"
    tap: str = "loom-tap"
    uplink: str = "loom-up"
    tap_queue_frames: int = 2000
    keep_on_exit: bool = True


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """What is to be used where the kernel has it; the names are those of `forwarder.offloads`."""

    tso: bool = True
    uso: bool = True
    udp_segment: bool = True
    udp_gro: bool = True
    merge_tcp: bool = True
    merge_udp: bool = True
    uplink: str = "auto"
    threaded_napi: bool = True
    spin: bool = True


@dataclass(frozen=True, slots=True)
class UnderlayConfig:
    direct: str = "off"
    bfd_port: int = 4784


@dataclass(frozen=True, slots=True)
class BgpConfig:
    """`include` is None where no routing daemon is told of this node's prefixes."""

    include: Path | None = None
    control_socket: Path = Path("/run/bird/bird.ctl")
    route_protocol: int = 12


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """`urls` to `hold_seconds` are etcd's, the files' being None where there is none; `kubeconfig` to
    `compat` Kubernetes'."""

    source: str = "static"
    file: Path = Path("/etc/podloom/peers.toml")
    urls: tuple[str, ...] = ("http://127.0.0.1:2379",)
    key_prefix: str = "/podloom"
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    username: str = ""
    password_file: Path | None = None
    prefix_length_ipv4: int = 24
    prefix_length_ipv6: int = 64
    lease_seconds: int = 30
    hold_seconds: int = 3600
    kubeconfig: Path | None = None
    node_name: str = ""
    compat: str = "none"

    def prefix_length(self, version: int) -> int:
        """Of the prefixes that nodes take from the cluster's networks of an IP version."""
        return self.prefix_length_ipv4 if version == 4 else self.prefix_length_ipv6


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """A peer is down after `interval_seconds` times `detect_multiplier` without a word of it."""

    enabled: bool = True
    interval_seconds: int = 1
    detect_multiplier: int = 3
    roaming: bool = False
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    cluster: ClusterConfig
    node: NodeConfig
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    underlay: UnderlayConfig = field(default_factory=UnderlayConfig)
    bgp: BgpConfig = field(default_factory=BgpConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    names: NamesConfig = field(default_factory=NamesConfig)
    peers: tuple[PeerRecord, ...] = ()
    """Those written in the main file; the discovery source's come on top."""
    services: tuple[Service, ...] = ()

    @property
    def local(self) -> Local:
        return Local(
            id=self.node.id,
            router_mac=self.node.router_mac,
            endpoints=self.node.endpoints,
            prefixes=self.node.prefixes,
            cluster_cidrs=self.cluster.cidrs,
        )

    @property
    def features(self) -> tuple[str, ...]:
        """What this node can do besides, of FEATURES, and tells its peers."""
        return (
            *((REMOTE_CHECKSUM,) if self.tunnel.remote_checksum else ()),
            *((HEALTH,) if self.health.enabled else ()),
            *((DIRECT,) if self.underlay.direct == "auto" else ()),
            *((ROAMING,) if self.health.roaming else ()),
        )

    @property
    def socket_path(self) -> Path:
        return self.node.run_dir / SOCKET_NAME


def load(path: Path) -> Config:
    """The configuration in a file. ConfigError also when it cannot be read."""
    return parse(read_text(path))


def read_text(path: Path) -> str:
    """A file's text. ConfigError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; must be a TOML file (podloom config --example)"
        raise ConfigError([Fault("", MISSING, reason)]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Fault("", MISSING, f"must be UTF-8 text: {error}")]) from None


def parse(text: str) -> Config:
    """The configuration a TOML text describes. ConfigError with every fault in it."""
    faults: list[Fault] = []
    tables = _decode(text)
    cluster = read_section(ClusterConfig, _CLUSTER, _pop_table(tables, "cluster", faults), "cluster", faults)
    node_table = _pop_table(tables, "node", faults)
    node = read_section(NodeConfig, _NODE, node_table, "node", faults)
    tunnel = read_section(TunnelConfig, _TUNNEL, _pop_table(tables, "tunnel", faults), "tunnel", faults)
    links = read_section(LinksConfig, _LINKS, _pop_table(tables, "links", faults), "links", faults)
    offload = read_section(OffloadConfig, _OFFLOAD, _pop_table(tables, "offload", faults), "offload", faults)
    underlay = read_section(
        UnderlayConfig, _UNDERLAY, _pop_table(tables, "underlay", faults), "underlay", faults
    )
    bgp = read_section(BgpConfig, _BGP, _pop_table(tables, "bgp", faults), "bgp", faults)
    discovery = read_section(
        DiscoveryConfig, _DISCOVERY, _pop_table(tables, "discovery", faults), "discovery", faults
    )
    health = read_section(HealthConfig, _HEALTH, _pop_table(tables, "health", faults), "health", faults)
    names = read_section(NamesConfig, NAMES, _pop_table(tables, "names", faults), "names", faults)
    services = read_services(tables, (names or NamesConfig()).domain, faults)
    if "endpoints" not in node_table and not node_table.get("device"):
        faults.append(
            Fault("node.endpoints", MISSING, f"{_NODE['endpoints'].allowed}, or node.device be given")
        )
    if "prefixes" not in node_table and (discovery is None or discovery.source == "static"):
        faults.append(Fault("node.prefixes", MISSING, _NODE["prefixes"].allowed))
    # A peer's absent keys stand for ours; where ours are faulty any value does to find the peer's faults.
    defaults = cluster or ClusterConfig(()), tunnel or TunnelConfig()
    peers = _read_peers(tables, *defaults, faults)
    refuse_unknown(tables, (*SECTIONS, "peer", "service"), "", faults)
    if not (cluster and node and tunnel and links and offload and underlay and bgp and discovery):
        raise ConfigError(faults)
    if not (health and names) or faults:
        raise ConfigError(faults)
    config = Config(
        cluster, node, tunnel, links, offload, underlay, bgp, discovery, health, names, peers, services
    )
    # What values mean together can only be judged once each is sound by itself.
    faults = [*_check_together(config), *check(config.peers, config.local)]
    if faults:
        raise ConfigError(faults)
    return config


def parse_peers(text: str, config: Config) -> tuple[PeerRecord, ...]:
    """The peers a TOML text of [[peer]] tables describes, each sound by itself: `peers.check` judges them
    together. ConfigError with every fault in it."""
    faults: list[Fault] = []
    tables = _decode(text)
    peers = _read_peers(tables, config.cluster, config.tunnel, faults)
    refuse_unknown(tables, ("peer",), "", faults)
    if faults:
        raise ConfigError(faults)
    return peers


def read_record(table: Mapping[str, Any], key: str) -> PeerRecord:
    """The peer that somebody else's table describes, in which what we do not know is left alone: a newer
    podloom may have written it. ConfigError with every fault in it, each below `key`."""
    faults: list[Fault] = []
    known = {name: value for name, value in table.items() if name in _PEER}
    if isinstance(known.get("features"), list):
        known["features"] = [feature for feature in known["features"] if feature in FEATURES]
    record = read_section(PeerRecord, _PEER, known, key, faults)
    if record is None:
        raise ConfigError(faults)
    return record


def record_table(record: PeerRecord) -> dict[str, Any]:
    """What `read_record` reads the same record from; it can be written as JSON."""
    return {
        "id": record.id,
        "endpoints": [str(endpoint) for endpoint in record.endpoints],
        "port": record.port,
        "encapsulation": record.encapsulation,
        "vni": record.vni,
        "router_mac": format_mac(record.router_mac),
        "prefixes": [str(prefix) for prefix in record.prefixes],
        "features": list(record.features),
    }


def own_record(config: Config) -> PeerRecord:
    """This node as its peers are to know it; the configuration is identified and has prefixes."""
    assert config.node.id is not None  # noqa: S101 (identified)
    assert config.node.router_mac is not None  # noqa: S101
    tunnel = config.tunnel
    return PeerRecord(
        id=config.node.id,
        endpoints=config.node.endpoints,
        port=tunnel.port(tunnel.encapsulation),
        encapsulation=tunnel.encapsulation,
        vni=config.cluster.vni,
        router_mac=config.node.router_mac,
        prefixes=config.node.prefixes,
        features=config.features,
    )


def is_node_id(text: str) -> bool:
    return re.fullmatch(_NODE_ID_PATTERN, text) is not None


def render(config: Config) -> str:
    """The effective configuration as TOML that parses to the same."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    lines = []
    for name, section in sections.items():
        lines += [f"[{name}]", *_render_fields(section), ""]
    for peer in config.peers:
        lines += ["[[peer]]", *_render_fields(peer), ""]
    for service in config.services:
        lines += ["[[service]]", *_render_fields(service), ""]
    return "\n".join(lines)


def example() -> str:
    """A commented file with every key; the optional ones stand at their default, commented out."""
    tunnel, links, discovery, health = TunnelConfig(), LinksConfig(), DiscoveryConfig(), HealthConfig()
    underlay, bgp, bgp_include = UnderlayConfig(), BgpConfig(), "/etc/bird/podloom.conf"
    return f"""\
# podloom's configuration, one file a node. What is commented out stands at its default.
# `podloom config -c FILE` prints the effective values.

[cluster]
# All pods of all nodes, the same on every node. One or more prefixes, IPv4 and IPv6.
cidrs = ["10.42.0.0/16", "fd42::/48"]
# The network's number on the wire, 0 to {MAX_VNI}.
#vni = {ClusterConfig.__dataclass_fields__["vni"].default}

[node]
# This node's addresses on the underlay: one IPv4, one IPv6, or one of each.
endpoints = ["192.0.2.1"]
# Instead of them, the device that has it: its IPv4 address, or its IPv6 address if it has no other, followed
# when it changes. "{AUTO}" is the device of the default route.
#device = ""
# What this node's pods get their addresses from. Inside cluster.cidrs and nobody else's. May be left out
# where the discovery source gives them: etcd from cluster.cidrs, kubernetes from the Node's podCIDRs.
prefixes = ["10.42.1.0/24", "fd42:0:0:1::/64"]
# The node's name for its peers. Default: a random one, made once and kept in state_dir.
#id = "node-1"
# The MAC that peers address this node's pods by. Default: derived from the id.
#router_mac = "02:00:00:00:00:01"
#state_dir = "{NodeConfig.__dataclass_fields__["state_dir"].default}"
#run_dir = "{NodeConfig.__dataclass_fields__["run_dir"].default}"
# true gives what pods send out of the cluster this node's own address; among pods never. Needs nftables.
#ip_masquerade = {_toml(NodeConfig.__dataclass_fields__["ip_masquerade"].default)}

[tunnel]
# What peers are sent unless their record says otherwise: "geneve" or "vxlan". Both are always received.
#encapsulation = "{tunnel.encapsulation}"
#geneve_port = {tunnel.geneve_port}
# More than one is listened on at once; 8472 is what Linux used before the IANA number. The first one
# is what VXLAN peers are sent to. [] listens on none.
#vxlan_ports = {_toml(tunnel.vxlan_ports)}
# "strict" drops datagrams with reserved bits set, as Linux does; "rfc" ignores the bits (RFC 7348).
#vxlan_reserved_bits = "{tunnel.vxlan_reserved_bits}"
# true leaves inner checksums to the receiving host, towards peers whose record has the feature
# "{REMOTE_CHECKSUM}" (Geneve only). Pods' MTU is {OPTION_BYTES} bytes less for it.
#remote_checksum = {_toml(tunnel.remote_checksum)}
# 0 reads it from the device that has the endpoint.
#underlay_mtu_bytes = {tunnel.underlay_mtu_bytes}

[links]
#bridge = "{links.bridge}"
#tap = "{links.tap}"
#uplink = "{links.uplink}"
# Frames that wait in the TAP while the daemon is busy.
#tap_queue_frames = {links.tap_queue_frames}
# true leaves the bridge when the daemon stops, so that pods keep their wiring; false removes it.
#keep_on_exit = {_toml(links.keep_on_exit)}

[offload]
# What the kernel may spare the data plane; it is probed, and `podloom status` says what is on and why
# not. They change nothing but speed, and can be changed while the daemon runs (podloom offload).
# uplink: "auto" uses it where the underlay's device cuts tunnels itself, "on" wherever it works.
# threaded_napi: a thread of the kernel's takes what is written to the TAP further, while bytes move in
# bulk; the rest goes without its wake.
# spin: look for the next packet for a moment before sleeping, while packets follow closely; a busy CPU
# for shorter round trips.
{_offload_lines()}

[underlay]
# "auto" sends pods' packets without a tunnel to peers on a segment of ours whose record has the feature
# "{DIRECT}", as it then has ours, while BFD proves that they arrive; "off" never does. It trusts everybody on
# the segment: a packet's sender is not checked any more.
#direct = "{underlay.direct}"
# Of BFD, between nodes' gateway addresses; the same on every node.
#bfd_port = {underlay.bfd_port}

[bgp]
# A file that is kept for BIRD 2, with static routes for this node's prefixes: the protocols podloom4 and
# podloom6. Put `include "{bgp_include}";` into bird.conf, export them by BGP, and export to the
# kernel what BGP brings. "" is none.
#include = ""
#control_socket = "{bgp.control_socket}"
# Whose kernel routes are taken for peers' prefixes (rtm_protocol): 12 is BIRD's, 186 FRR's BGP.
#route_protocol = {bgp.route_protocol}

[discovery]
# Where peers come from; the [[peer]] tables here come on top, and stand where the two disagree.
# "static": a file of [[peer]] tables that is re-read when it changes. "etcd": nodes register themselves.
# "kubernetes": the cluster's Node objects.
#source = "{discovery.source}"
#file = "{discovery.file}"
# etcd: any of its members, and what the keys begin with. "" is no file, or no user.
#urls = {_toml(discovery.urls)}
#key_prefix = "{discovery.key_prefix}"
#ca_file = ""
#cert_file = ""
#key_file = ""
#username = ""
#password_file = ""
# How long the prefixes are that nodes without node.prefixes take from cluster.cidrs.
#prefix_length_ipv4 = {discovery.prefix_length_ipv4}
#prefix_length_ipv6 = {discovery.prefix_length_ipv6}
# A node not heard of for lease_seconds is no peer any more; its prefix is withheld for hold_seconds, in
# which it can come back to it, and then free for another.
#lease_seconds = {discovery.lease_seconds}
#hold_seconds = {discovery.hold_seconds}
# kubernetes: "" is the service account of the pod that podloom runs in.
#kubeconfig = ""
# This node's name there. "": the environment's NODE_NAME, or else the host's name.
#node_name = ""
# "flannel" joins a cluster of flannel's VXLAN nodes, by flannel's annotations instead of ours.
#compat = "{discovery.compat}"

[health]
# Probes to every peer whose record has the feature "{HEALTH}" tell what `podloom peers` shows of the path:
# up or down, round trip time, loss, and the path MTU where the underlay says nothing of it.
#enabled = {_toml(health.enabled)}
# Between two probes of a peer; longer where those of all would be more than {MAX_PROBES_PER_SECOND} a second.
#interval_seconds = {health.interval_seconds}
# A peer that is silent for so many intervals is down.
#detect_multiplier = {health.detect_multiplier}
# true finds peers with the feature "{ROAMING}" where they are, when a NAT hides them or their address has
# changed, by probes that prove themselves by the cluster's key: a file of {MIN_KEY_BYTES} bytes or more.
#roaming = {_toml(health.roaming)}
#key_file = ""

{names_example()}
# One table for each other node.
#[[peer]]
#id = "node-2"
# One IPv4, one IPv6, or one of each, the preferred first.
#endpoints = ["192.0.2.2"]
#prefixes = ["10.42.2.0/24", "fd42:0:0:2::/64"]
# Default: derived from the id, as that node does itself. One that is not podloom's has to be given.
#router_mac = "02:00:00:00:00:02"
# Default: tunnel.encapsulation, that encapsulation's port, cluster.vni.
#encapsulation = "geneve"
#port = 6081
#vni = 1
# What it can do besides: "{HEALTH}" if it is podloom and its health.enabled is true, "{REMOTE_CHECKSUM}" if
# its tunnel.remote_checksum is, "{DIRECT}" if its underlay.direct is "auto".
#features = []
"""


def _offload_lines() -> str:
    return "\n".join(f"#{line}" for line in _render_fields(OffloadConfig()))


def _decode(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError([Fault("", MISSING, f"must be TOML: {error}")]) from None


def _pop_table(tables: dict[str, Any], name: str, faults: list[Fault]) -> dict[str, Any]:
    table = tables.pop(name, {})
    if isinstance(table, dict):
        return table
    faults.append(Fault(name, table, f"must be a table: [{name}]"))
    return {}


def _read_peers(
    tables: dict[str, Any], cluster: ClusterConfig, tunnel: TunnelConfig, faults: list[Fault]
) -> tuple[PeerRecord, ...]:
    rows = tables.pop("peer", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        faults.append(Fault("peer", rows, "must be tables, one for each peer: [[peer]]"))
        return ()
    peers = []
    for index, row in enumerate(rows):
        encapsulation = row.get("encapsulation", tunnel.encapsulation)
        defaults = {
            "router_mac": format_mac(derive_mac(str(row.get("id")), "router")),
            "encapsulation": encapsulation,
            "port": tunnel.port(encapsulation if encapsulation in ENCAPSULATIONS else "geneve"),
            "vni": cluster.vni,
        }
        peer = read_section(PeerRecord, _PEER, {**defaults, **row}, f"peer[{index}]", faults)
        if peer is not None:
            peers.append(peer)
    return tuple(peers)


def _check_together(config: Config) -> Iterator[Fault]:
    cidrs, node, tunnel, links = config.cluster.cidrs, config.node, config.tunnel, config.links
    for key, prefixes in (("cluster.cidrs", cidrs), ("node.prefixes", node.prefixes)):
        named = [NamedPrefix(prefix, f"{key}[{index}]") for index, prefix in enumerate(prefixes)]
        for one, other in overlaps(named):
            yield Fault(one.key, one.prefix, f"must not overlap {other.prefix} of {other.key}")
    for index, prefix in enumerate(node.prefixes):
        if not any(is_inside(prefix, cidr) for cidr in cidrs):
            yield Fault(f"node.prefixes[{index}]", prefix, "must lie inside one of cluster.cidrs")
    for index, endpoint in enumerate(node.endpoints):
        if any(endpoint in cidr for cidr in cidrs):
            allowed = "must be an underlay address, outside cluster.cidrs"
            yield Fault(f"node.endpoints[{index}]", endpoint, allowed)
    if node.device and node.endpoints:
        yield Fault("node.device", node.device, "must be left out where node.endpoints is given")
    if tunnel.encapsulation == "vxlan" and not tunnel.vxlan_ports:
        yield Fault("tunnel.vxlan_ports", [], 'must hold a port when tunnel.encapsulation is "vxlan"')
    if tunnel.geneve_port in tunnel.vxlan_ports:
        yield Fault("tunnel.geneve_port", tunnel.geneve_port, "must not be one of tunnel.vxlan_ports")
    if links.tap == links.bridge:
        yield Fault("links.tap", links.tap, "must differ from links.bridge")
    if links.uplink in (links.bridge, links.tap):
        yield Fault("links.uplink", links.uplink, "must differ from links.bridge and links.tap")
    for index, address in enumerate(config.names.addresses):
        if any(address in cidr for cidr in cidrs) or address in node.endpoints:
            allowed = "must be outside cluster.cidrs and none of node.endpoints"
            yield Fault(f"names.addresses[{index}]", address, allowed)
    if config.health.roaming and config.health.key_file is None:
        yield Fault("health.key_file", MISSING, "must name a file with the cluster's key for health.roaming")
    yield from _check_discovery(config)


def _check_discovery(config: Config) -> Iterator[Fault]:
    discovery = config.discovery
    if discovery.source == "etcd" and not config.node.prefixes:
        for cidr in config.cluster.cidrs:
            length = discovery.prefix_length(cidr.version)
            if length < cidr.prefixlen:
                key = f"discovery.prefix_length_ipv{cidr.version}"
                yield Fault(key, length, f"must be at least {cidr.prefixlen}, to lie inside {cidr}")
    if (discovery.cert_file is None) != (discovery.key_file is None):
        missing = "key_file" if discovery.key_file is None else "cert_file"
        yield Fault(f"discovery.{missing}", MISSING, "cert_file and key_file go together")
    if (discovery.username == "") != (discovery.password_file is None):
        missing = "password_file" if discovery.username else "username"
        yield Fault(f"discovery.{missing}", MISSING, "username and password_file go together")
    if discovery.hold_seconds < discovery.lease_seconds:
        allowed = f"must be at least discovery.lease_seconds, {discovery.lease_seconds}"
        yield Fault("discovery.hold_seconds", discovery.hold_seconds, allowed)
    if discovery.compat == "flannel" and config.tunnel.encapsulation != "vxlan":
        allowed = 'must be "vxlan" when discovery.compat is "flannel"'
        yield Fault("tunnel.encapsulation", config.tunnel.encapsulation, allowed)


def _endpoints() -> Kind:
    allowed = "must be a list of one IPv4 address, one IPv6 address, or one of each"
    addresses = list_of(kind_of(str, "must be a unicast IP address", _endpoint), allowed, at_least=1)

    def convert(value: Any) -> tuple[Address, ...]:
        endpoints: tuple[Address, ...] = addresses.convert(value)
        if len({endpoint.version for endpoint in endpoints}) != len(endpoints):
            raise RefusedError(("", value, allowed))
        return endpoints

    return Kind(convert, allowed)


def _endpoint(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("must be an IP address") from None
    if any(address in network for network in _NOT_UNICAST):
        raise ValueError("must be a global or private unicast address")
    return address


def _prefix(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError('must be a network such as "10.42.0.0/16"') from None
    raise ValueError(f"must have no host bits set; did you mean {meant}?")


def _cluster_cidr(text: str) -> Network:
    cidr = _prefix(text)
    for network in _NOT_UNICAST:
        if cidr.version == network.version and cidr.overlaps(network):
            raise ValueError(f"must not overlap {network}, which is not for unicast")
    return cidr


def _node_prefix(text: str) -> Network:
    prefix = _prefix(text)
    longest = LONGEST_GATEWAY_PREFIX[prefix.version]
    if prefix.prefixlen > longest:
        raise ValueError(f"must be /{longest} or shorter, to hold the gateway and a pod")
    return prefix


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise ValueError
    return path


def _optional_file(text: str) -> Path | None:
    return _directory(text) if text else None


def _run_directory(text: str) -> Path:
    path = _directory(text)
    if len(bytes(path / SOCKET_NAME)) > MAX_SOCKET_PATH_BYTES:
        limit = MAX_SOCKET_PATH_BYTES - len(SOCKET_NAME) - 1
        raise ValueError(f"must be at most {limit} bytes: a socket's path is limited by the kernel")
    return path


MAX_SOCKET_PATH_BYTES: Final = 107
"""sockaddr_un.sun_path without its final zero, linux/un.h."""

_NOT_UNICAST: Final[tuple[Network, ...]] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "255.255.255.255/32",
        "::/8",
        "fe80::/10",
        "ff00::/8",
    )
)

_ABSOLUTE = "must be an absolute path"
_LINK_NAME = matching(r"[A-Za-z0-9_.-]{1,15}", "must be 1 to 15 of A-Z a-z 0-9 _ . -")
_NODE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_NODE_ID = matching(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
    "must be 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
)
_MAC_ALLOWED = 'must be a unicast MAC such as "02:00:00:00:00:01"'


def _mac(text: str) -> bytes:
    try:
        return parse_mac(text)
    except ValueError as error:
        raise ValueError(f"{_MAC_ALLOWED}; this is {error}") from None


_MAC = kind_of(str, _MAC_ALLOWED, _mac)
_PORT = integer(1, 65535)
_VNI = integer(0, MAX_VNI)

_CLUSTER: Final = {
    "cidrs": list_of(
        kind_of(str, "must be a network", _cluster_cidr),
        "must be a list of the networks that all pods' addresses are from",
        at_least=1,
    ),
    "vni": _VNI,
}
_NODE: Final = {
    "endpoints": _endpoints(),
    "device": matching(r"[^/\s]{0,15}", 'must be a network device, "auto", or ""'),
    "prefixes": list_of(
        kind_of(str, "must be a network", _node_prefix),
        "must be a list of the networks that this node's pods get addresses from",
        at_least=1,
    ),
    "id": _NODE_ID,
    "router_mac": _MAC,
    "state_dir": kind_of(str, _ABSOLUTE, _directory),
    "run_dir": kind_of(str, _ABSOLUTE, _run_directory),
    "ip_masquerade": kind_of(bool, "must be true or false"),
}
_TUNNEL: Final = {
    "encapsulation": one_of(*ENCAPSULATIONS),
    "geneve_port": _PORT,
    "vxlan_ports": list_of(
        _PORT, f"must be a list of at most {MAX_VXLAN_PORTS} UDP ports", at_most=MAX_VXLAN_PORTS
    ),
    "vxlan_reserved_bits": one_of("strict", "rfc"),
    "remote_checksum": kind_of(bool, "must be true or false"),
    "underlay_mtu_bytes": integer(MIN_UNDERLAY_MTU_BYTES, MAX_MTU_BYTES, or_zero=True),
}
_LINKS: Final = {
    "bridge": _LINK_NAME,
    "tap": _LINK_NAME,
    "uplink": _LINK_NAME,
    "tap_queue_frames": integer(16, 65536),
    "keep_on_exit": kind_of(bool, "must be true or false"),
}
_OFFLOAD: Final = {
    **{item.name: kind_of(bool, "must be true or false") for item in fields(OffloadConfig)},
    "uplink": one_of(*UPLINK_CHOICES),
}
_OPTIONAL_FILE = kind_of(str, 'must be an absolute path, or ""', _optional_file)
_UNDERLAY: Final = {"direct": one_of("auto", "off"), "bfd_port": _PORT}
_BGP: Final = {
    "include": _OPTIONAL_FILE,
    "control_socket": kind_of(str, _ABSOLUTE, _directory),
    "route_protocol": integer(5, 255),
}
_DISCOVERY: Final = {
    "source": one_of("static", "etcd", "kubernetes"),
    "file": kind_of(str, _ABSOLUTE, _directory),
    "urls": list_of(
        matching(
            r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[1-9][0-9]{0,4})?",
            'must be a URL such as "https://192.0.2.9:2379"',
        ),
        "must be a list of the URLs of etcd's members",
        at_least=1,
    ),
    "key_prefix": matching(r"/[A-Za-z0-9_./-]{0,200}[A-Za-z0-9_.-]", 'must be a path such as "/podloom"'),
    "ca_file": _OPTIONAL_FILE,
    "cert_file": _OPTIONAL_FILE,
    "key_file": _OPTIONAL_FILE,
    "username": kind_of(str, "must be a string"),
    "password_file": _OPTIONAL_FILE,
    "prefix_length_ipv4": integer(8, LONGEST_GATEWAY_PREFIX[4]),
    "prefix_length_ipv6": integer(16, LONGEST_GATEWAY_PREFIX[6]),
    "lease_seconds": integer(2, 3600),
    "hold_seconds": integer(2, 30 * 86400),
    "kubeconfig": _OPTIONAL_FILE,
    "node_name": matching(r"[a-z0-9.-]{0,253}", 'must be a Node\'s name, or ""'),
    "compat": one_of("none", "flannel"),
}
_HEALTH: Final = {
    "enabled": kind_of(bool, "must be true or false"),
    "interval_seconds": integer(1, 60),
    "detect_multiplier": integer(2, 50),
    "roaming": kind_of(bool, "must be true or false"),
    "key_file": _OPTIONAL_FILE,
}
_PEER: Final = {
    "id": _NODE_ID,
    "endpoints": _endpoints(),
    "port": _PORT,
    "encapsulation": one_of(*ENCAPSULATIONS),
    "vni": _VNI,
    "router_mac": _MAC,
    "prefixes": list_of(
        kind_of(str, "must be a network", _prefix),
        "must be a list of the networks that the peer's pods get addresses from",
        at_least=1,
    ),
    "features": list_of(one_of(*FEATURES), "must be a list of features"),
}


def _render_fields(section: Any) -> Iterator[str]:
    for item in fields(section):
        value = getattr(section, item.name)
        if value is not None and (value != () or item.default != ()):
            yield f"{item.name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(element) for element in value) + "]"
    if isinstance(value, bytes):
        return f'"{format_mac(value)}"'
    if is_dataclass(value):
        return "{ " + ", ".join(_render_fields(value)) + " }"
    # JSON's string escapes are TOML's.
    return json.dumps(str(value), ensure_ascii=False)
