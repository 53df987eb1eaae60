"""The operator's file: what may stand in it, what it means, and every default.

`parse` is pure and reports all faults at once; only `load` touches the machine. What the machine must
say (the stored node id, the underlay's MTU) is not filled in here.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

from forwarder.addresses import Address, Network, derive_mac, format_mac, parse_mac
from forwarder.control.messages import DEFAULT_RUN_DIR, SOCKET_NAME
from forwarder.faults import MISSING, ConfigError, Fault
from forwarder.peers import OVERHEAD_BYTES, Local, NamedPrefix, PeerRecord, check, is_inside, overlaps

DEFAULT_PATH: Final = Path("/etc/podloom/podloom.toml")
ENCAPSULATIONS: Final = ("geneve", "vxlan")
MAX_VNI: Final = (1 << 24) - 1
MAX_VXLAN_PORTS: Final = 3
"""With Geneve's, in two IP versions, as many receivers as the pump takes."""

MAX_MTU_BYTES: Final = 65535
MIN_UNDERLAY_MTU_BYTES: Final = 576 + max(OVERHEAD_BYTES.values())
"""Leaves 576 bytes inside, which every IPv4 host must take (RFC 791)."""
LONGEST_GATEWAY_PREFIX: Final = {4: 30, 6: 126}
"""A node's prefix must hold the gateway and a pod besides its first and last address."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    cidrs: tuple[Network, ...]
    vni: int = 1


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`id` and `router_mac` are None when the stored id is to be used and the MAC derived from it."""

    endpoints: tuple[Address, ...]
    prefixes: tuple[Network, ...]
    id: str | None = None
    router_mac: bytes | None = None
    state_dir: Path = Path("/var/lib/podloom")
    run_dir: Path = Path(DEFAULT_RUN_DIR)


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    encapsulation: str = "geneve"
    geneve_port: int = 6081
    vxlan_ports: tuple[int, ...] = (4789,)
    vxlan_reserved_bits: str = "strict"
    underlay_mtu_bytes: int = 0

    def port(self, encapsulation: str) -> int:
        """The UDP port this cluster uses for an encapsulation, when nothing else is said."""
        if encapsulation == "geneve":
            return self.geneve_port
        return self.vxlan_ports[0] if self.vxlan_ports else TunnelConfig().vxlan_ports[0]


@dataclass(frozen=True, slots=True)
class LinksConfig:
    bridge: str = "loom0"
    tap: str = "loom-tap"
    tap_queue_frames: int = 2000
    keep_on_exit: bool = True


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    source: str = "static"
    file: Path = Path("/etc/podloom/peers.toml")


@dataclass(frozen=True, slots=True)
class Config:
    cluster: ClusterConfig
    node: NodeConfig
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    peers: tuple[PeerRecord, ...] = ()
    """Those written in the main file; the discovery source's come on top."""

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
    cluster = _read(ClusterConfig, _CLUSTER, _pop_table(tables, "cluster", faults), "cluster", faults)
    node = _read(NodeConfig, _NODE, _pop_table(tables, "node", faults), "node", faults)
    tunnel = _read(TunnelConfig, _TUNNEL, _pop_table(tables, "tunnel", faults), "tunnel", faults)
    links = _read(LinksConfig, _LINKS, _pop_table(tables, "links", faults), "links", faults)
    discovery = _read(
        DiscoveryConfig, _DISCOVERY, _pop_table(tables, "discovery", faults), "discovery", faults
    )
    # A peer's absent keys stand for ours; where ours are faulty any value does to find the peer's faults.
    defaults = cluster or ClusterConfig(()), tunnel or TunnelConfig()
    peers = _read_peers(tables, *defaults, faults)
    _refuse_unknown(tables, ("cluster", "node", "tunnel", "links", "discovery", "peer"), "", faults)
    if cluster is None or node is None or tunnel is None or links is None or discovery is None or faults:
        raise ConfigError(faults)
    config = Config(cluster, node, tunnel, links, discovery, peers)
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
    _refuse_unknown(tables, ("peer",), "", faults)
    if faults:
        raise ConfigError(faults)
    return peers


def is_node_id(text: str) -> bool:
    return re.fullmatch(_NODE_ID_PATTERN, text) is not None


def render(config: Config) -> str:
    """The effective configuration as TOML that parses to the same."""
    sections = {name: getattr(config, name) for name in ("cluster", "node", "tunnel", "links", "discovery")}
    lines = []
    for name, section in sections.items():
        lines += [f"[{name}]", *_render_fields(section), ""]
    for peer in config.peers:
        lines += ["[[peer]]", *_render_fields(peer), ""]
    return "\n".join(lines)


def example() -> str:
    """A commented file with every key; the optional ones stand at their default, commented out."""
    tunnel, links, discovery = TunnelConfig(), LinksConfig(), DiscoveryConfig()
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
# What this node's pods get their addresses from. Inside cluster.cidrs and nobody else's.
prefixes = ["10.42.1.0/24", "fd42:0:0:1::/64"]
# The node's name for its peers. Default: a random one, made once and kept in state_dir.
#id = "node-1"
# The MAC that peers address this node's pods by. Default: derived from the id.
#router_mac = "02:00:00:00:00:01"
#state_dir = "{NodeConfig.__dataclass_fields__["state_dir"].default}"
#run_dir = "{NodeConfig.__dataclass_fields__["run_dir"].default}"

[tunnel]
# What peers are sent unless their record says otherwise: "geneve" or "vxlan". Both are always received.
#encapsulation = "{tunnel.encapsulation}"
#geneve_port = {tunnel.geneve_port}
# More than one is listened on at once; 8472 is what Linux used before the IANA number. The first one
# is what VXLAN peers are sent to. [] listens on none.
#vxlan_ports = {_toml(tunnel.vxlan_ports)}
# "strict" drops datagrams with reserved bits set, as Linux does; "rfc" ignores the bits (RFC 7348).
#vxlan_reserved_bits = "{tunnel.vxlan_reserved_bits}"
# 0 reads it from the device that has the endpoint.
#underlay_mtu_bytes = {tunnel.underlay_mtu_bytes}

[links]
#bridge = "{links.bridge}"
#tap = "{links.tap}"
# Frames that wait in the TAP while the daemon is busy.
#tap_queue_frames = {links.tap_queue_frames}
# true leaves the bridge when the daemon stops, so that pods keep their wiring; false removes it.
#keep_on_exit = {_toml(links.keep_on_exit)}

[discovery]
# Where peers come from. "static": [[peer]] tables, here and in a file that is re-read when it changes.
#source = "{discovery.source}"
#file = "{discovery.file}"

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
"""


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
        peer = _read(PeerRecord, _PEER, {**defaults, **row}, f"peer[{index}]", faults)
        if peer is not None:
            peers.append(peer)
    return tuple(peers)


def _read(
    section: type[T], kinds: Mapping[str, _Kind], table: Mapping[str, Any], path: str, faults: list[Fault]
) -> T | None:
    """The section with the table's values, the dataclass's own defaults for what is absent; None if any
    value was refused."""
    before = len(faults)
    _refuse_unknown(table, kinds, f"{path}.", faults)
    values = {}
    for item in fields(cast(Any, section)):
        key = f"{path}.{item.name}"
        if item.name in table:
            try:
                values[item.name] = kinds[item.name].convert(table[item.name])
            except _RefusedError as refused:
                faults += [Fault(key + suffix, value, allowed) for suffix, value, allowed in refused.parts]
        elif item.default is dataclasses.MISSING:
            faults.append(Fault(key, MISSING, kinds[item.name].allowed))
    return section(**values) if len(faults) == before else None


def _refuse_unknown(
    table: Mapping[str, Any], known: Collection[str], prefix: str, faults: list[Fault]
) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"
            faults.append(Fault(prefix + key, table[key], f"is not a key podloom knows; {hint}"))


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
    if tunnel.encapsulation == "vxlan" and not tunnel.vxlan_ports:
        yield Fault("tunnel.vxlan_ports", [], 'must hold a port when tunnel.encapsulation is "vxlan"')
    if tunnel.geneve_port in tunnel.vxlan_ports:
        yield Fault("tunnel.geneve_port", tunnel.geneve_port, "must not be one of tunnel.vxlan_ports")
    if links.tap == links.bridge:
        yield Fault("links.tap", links.tap, "must differ from links.bridge")


class _RefusedError(ValueError):
    """A value that is not allowed: (where in it, the value there, what is allowed) of each wrong part."""

    def __init__(self, *parts: tuple[str, Any, str]) -> None:
        self.parts = parts
        super().__init__(parts)


class _Kind(NamedTuple):
    """How a TOML value becomes ours, _RefusedError if it cannot, and the sentence on what is allowed."""

    convert: Callable[[Any], Any]
    allowed: str


def _kind(toml_type: type, allowed: str, convert: Callable[[Any], Any] = lambda value: value) -> _Kind:
    """A value of one TOML type; `convert` raises ValueError, with a text where more can be said."""

    def checked(value: Any) -> Any:
        if type(value) is not toml_type:  # not isinstance: TOML's true is no integer
            raise _RefusedError(("", value, allowed))
        try:
            return convert(value)
        except ValueError as error:
            raise _RefusedError(("", value, str(error) or allowed)) from None

    return _Kind(checked, allowed)


def _integer(low: int, high: int, *, or_zero: bool = False) -> _Kind:
    def convert(value: int) -> int:
        if not (low <= value <= high or (or_zero and value == 0)):
            raise ValueError
        return value

    return _kind(int, f"must be {'0 or ' if or_zero else ''}an integer from {low} to {high}", convert)


def _one_of(*allowed: str) -> _Kind:
    def convert(value: str) -> str:
        if value not in allowed:
            raise ValueError
        return value

    return _kind(str, "must be " + " or ".join(f'"{name}"' for name in allowed), convert)


def _matching(pattern: str, allowed: str) -> _Kind:
    def convert(value: str) -> str:
        if not re.fullmatch(pattern, value) or value in (".", ".."):
            raise ValueError
        return value

    return _kind(str, allowed, convert)


def _list_of(kind: _Kind, allowed: str, *, at_least: int = 0, at_most: int | None = None) -> _Kind:
    """A tuple of distinct values; each element's own fault names its index."""

    def convert(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) < at_least or len(value) > (at_most or len(value)):
            raise _RefusedError(("", value, allowed))
        converted: list[Any] = []
        parts: list[tuple[str, Any, str]] = []
        for index, element in enumerate(value):
            try:
                item = kind.convert(element)
            except _RefusedError as refused:
                parts += [(f"[{index}]{suffix}", wrong, text) for suffix, wrong, text in refused.parts]
                continue
            if item in converted:
                parts.append((f"[{index}]", element, "must not be listed twice"))
            converted.append(item)
        if parts:
            raise _RefusedError(*parts)
        return tuple(converted)

    return _Kind(convert, allowed)


def _endpoints() -> _Kind:
    allowed = "must be a list of one IPv4 address, one IPv6 address, or one of each"
    addresses = _list_of(_kind(str, "must be a unicast IP address", _endpoint), allowed, at_least=1)

    def convert(value: Any) -> tuple[Address, ...]:
        endpoints: tuple[Address, ...] = addresses.convert(value)
        if len({endpoint.version for endpoint in endpoints}) != len(endpoints):
            raise _RefusedError(("", value, allowed))
        return endpoints

    return _Kind(convert, allowed)


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
_LINK_NAME = _matching(r"[A-Za-z0-9_.-]{1,15}", "must be 1 to 15 of A-Z a-z 0-9 _ . -")
_NODE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_NODE_ID = _matching(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
    "must be 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
)
_MAC_ALLOWED = 'must be a unicast MAC such as "02:00:00:00:00:01"'


def _mac(text: str) -> bytes:
    try:
        return parse_mac(text)
    except ValueError as error:
        raise ValueError(f"{_MAC_ALLOWED}; this is {error}") from None


_MAC = _kind(str, _MAC_ALLOWED, _mac)
_PORT = _integer(1, 65535)
_VNI = _integer(0, MAX_VNI)

_CLUSTER: Final = {
    "cidrs": _list_of(
        _kind(str, "must be a network", _cluster_cidr),
        "must be a list of the networks that all pods' addresses are from",
        at_least=1,
    ),
    "vni": _VNI,
}
_NODE: Final = {
    "endpoints": _endpoints(),
    "prefixes": _list_of(
        _kind(str, "must be a network", _node_prefix),
        "must be a list of the networks that this node's pods get addresses from",
        at_least=1,
    ),
    "id": _NODE_ID,
    "router_mac": _MAC,
    "state_dir": _kind(str, _ABSOLUTE, _directory),
    "run_dir": _kind(str, _ABSOLUTE, _run_directory),
}
_TUNNEL: Final = {
    "encapsulation": _one_of(*ENCAPSULATIONS),
    "geneve_port": _PORT,
    "vxlan_ports": _list_of(
        _PORT, f"must be a list of at most {MAX_VXLAN_PORTS} UDP ports", at_most=MAX_VXLAN_PORTS
    ),
    "vxlan_reserved_bits": _one_of("strict", "rfc"),
    "underlay_mtu_bytes": _integer(MIN_UNDERLAY_MTU_BYTES, MAX_MTU_BYTES, or_zero=True),
}
_LINKS: Final = {
    "bridge": _LINK_NAME,
    "tap": _LINK_NAME,
    "tap_queue_frames": _integer(16, 65536),
    "keep_on_exit": _kind(bool, "must be true or false"),
}
_DISCOVERY: Final = {
    "source": _one_of("static"),
    "file": _kind(str, _ABSOLUTE, _directory),
}
_PEER: Final = {
    "id": _NODE_ID,
    "endpoints": _endpoints(),
    "port": _PORT,
    "encapsulation": _one_of(*ENCAPSULATIONS),
    "vni": _VNI,
    "router_mac": _MAC,
    "prefixes": _list_of(
        _kind(str, "must be a network", _prefix),
        "must be a list of the networks that the peer's pods get addresses from",
        at_least=1,
    ),
}


def _render_fields(section: Any) -> Iterator[str]:
    for item in fields(section):
        value = getattr(section, item.name)
        if value is not None:
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
    # JSON's string escapes are TOML's.
    return json.dumps(str(value), ensure_ascii=False)
