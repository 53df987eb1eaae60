"""What a network configuration asks of an ADD, beyond the call itself. Pure.

Sources: containernetworking/cni SPEC.md 1.1.0 "Network configuration" and CONVENTIONS.md; the keys of
`ipam.ranges` are those of the reference plugin host-local.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from cni.ipam import IpAddress, IpNetwork, Pool, RangeSet
from cni.result import CniError, Code

OWN_IPAM = "podloom"
"""`ipam.type` for our own allocation; no `ipam` at all means the same."""

QUARANTINE_S = 60.0
"""How long a released address rests while another is free: caches elsewhere may still name its last pod."""

_DAY_S = 86_400
MIN_MTU, MIN_IPV6_MTU = 68, 1280  # bytes; RFC 791, RFC 8200 section 5

_IPAM_KEYS = frozenset({"type", "ranges", "exclude", "quarantineSeconds"})
_RANGE_KEYS = frozenset({"subnet", "rangeStart", "rangeEnd", "gateway"})
_PLUGIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_ALIAS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,251}[A-Za-z0-9])?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

# Capabilities that somebody must have declared for this very plugin, and who does that work instead.
_OTHERS_WORK = {
    "portMappings": "chain the plugin portmap and declare the capability there",
    "bandwidth": "chain the plugin bandwidth and declare the capability there",
    "infinibandGUID": "pods have Ethernet links here",
    "deviceID": "pods have veth links here",
}


@dataclass(frozen=True)
class Range:
    """Addresses low..high of `subnet`; without a gateway the node's own for that subnet holds."""

    subnet: IpNetwork
    low: IpAddress
    high: IpAddress
    gateway: IpAddress | None


@dataclass(frozen=True)
class NetConf:
    """The configuration's wishes; empty is "as the node has it"."""

    ipam_type: str = OWN_IPAM
    range_sets: tuple[tuple[Range, ...], ...] = ()
    excluded: tuple[tuple[IpAddress, IpAddress], ...] = ()
    requested: tuple[IpAddress, ...] = ()
    mac: str = ""
    mtu: int | None = None
    dns: Mapping[str, Any] | None = None
    spoof_check: bool = True
    quarantine_s: float = QUARANTINE_S
    aliases: tuple[str, ...] = ()

    @property
    def delegated(self) -> bool:
        return self.ipam_type != OWN_IPAM


def ipam_type_of(config: Mapping[str, Any]) -> str:
    """The IPAM plugin's name, which DEL and GC need when nothing else of the configuration does."""
    name = _typed(config.get("ipam", {}), "type", str, "ipam.type") or OWN_IPAM
    if not _PLUGIN_NAME.fullmatch(name):
        raise _wrong("ipam.type", name, "a plugin's name, never a path")
    return name


def quarantine_of(config: Mapping[str, Any]) -> float:
    """How long addresses rest. What is wrong in the configuration must not stop a DEL: then the default."""
    try:
        return _quarantine(config.get("ipam", {}))
    except CniError:
        return QUARANTINE_S


def parse_netconf(config: Mapping[str, Any], args: Mapping[str, str]) -> NetConf:
    """CniError naming the key, its value and what is allowed. `args` are those of CNI_ARGS."""
    runtime = _typed(config, "runtimeConfig", dict, "runtimeConfig") or {}
    cni_args = _typed(_typed(config, "args", dict, "args") or {}, "cni", dict, "args.cni") or {}
    for key, instead in _OTHERS_WORK.items():
        if runtime.get(key):
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f"runtimeConfig.{key} is {_shown(runtime[key])}, unsupported: {instead}",
            )
    _typed(runtime, "cgroupPath", str, "runtimeConfig.cgroupPath")
    if config.get("ipMasq"):
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            "ipMasq is true, unsupported: whether pods are masqueraded is set for the whole node",
        )
    ipam_type = ipam_type_of(config)
    own = ipam_type == OWN_IPAM
    ipam = config.get("ipam", {}) if own else {}
    _refuse_unknown(ipam, _IPAM_KEYS, "ipam")
    raw_ranges = _typed(runtime, "ipRanges", list, "runtimeConfig.ipRanges")
    where = "runtimeConfig.ipRanges" if raw_ranges else "ipam.ranges"
    raw_ranges = raw_ranges or _typed(ipam, "ranges", list, "ipam.ranges") or []
    return NetConf(
        ipam_type=ipam_type,
        range_sets=tuple(_range_set(item, f"{where}[{n}]") for n, item in enumerate(raw_ranges))
        if own
        else (),
        excluded=tuple(_excluded(item) for item in _typed(ipam, "exclude", list, "ipam.exclude") or []),
        requested=_requested(runtime, cni_args, args) if own else (),
        mac=_mac(runtime, cni_args, args),
        mtu=_mtu(config),
        dns=_dns(config, runtime),
        spoof_check=_flag(config, "spoofCheck", default=True),
        quarantine_s=_quarantine(ipam),
        aliases=_aliases(runtime),
    )


def pools_for(
    conf: NetConf, prefixes: Sequence[IpNetwork], gateways: Sequence[IpAddress]
) -> tuple[RangeSet, ...]:
    """The range sets to allocate from on a node with these prefixes, each with its gateway."""
    if not conf.range_sets:
        own = (Pool.of_prefix(*pair) for pair in zip(prefixes, gateways, strict=True))
        return tuple((Pool(pool.low, pool.high, pool.gateway, conf.excluded),) for pool in own)
    made = []
    for ranges in conf.range_sets:
        pools = []
        for item in ranges:
            gateway = _gateway_for(item, prefixes, gateways)
            pools.append(Pool(item.low, item.high, item.gateway or gateway, conf.excluded))
        made.append(tuple(pools))
    return tuple(made)


def _gateway_for(item: Range, prefixes: Sequence[IpNetwork], gateways: Sequence[IpAddress]) -> IpAddress:
    for prefix, gateway in zip(prefixes, gateways, strict=True):
        if item.low in prefix and item.high in prefix:
            return gateway
    raise CniError(
        Code.INVALID_CONFIG,
        f"the range {item.low} to {item.high} is outside of this node's prefixes "
        f"{', '.join(map(str, prefixes))}: other nodes would not find its pods",
    )


def _range_set(raw: object, where: str) -> tuple[Range, ...]:
    if not isinstance(raw, list) or not raw:
        raise _wrong(where, raw, "a list of at least one range")
    ranges = tuple(_range(item, f"{where}[{n}]") for n, item in enumerate(raw))
    if len({item.subnet.version for item in ranges}) > 1:
        raise _wrong(where, [str(item.subnet) for item in ranges], "of one address family")
    return ranges


def _range(raw: object, where: str) -> Range:
    if not isinstance(raw, dict):
        raise _wrong(where, raw, "an object")
    _refuse_unknown(raw, _RANGE_KEYS, where)
    try:
        subnet = ip_network(_typed(raw, "subnet", str, f"{where}.subnet") or "", strict=False)
    except ValueError:
        raise _wrong(f"{where}.subnet", raw.get("subnet"), "a prefix such as 10.71.0.0/24") from None
    whole = Pool.of_prefix(subnet, subnet.network_address)
    low = _within(raw, "rangeStart", where, subnet) or whole.low
    high = _within(raw, "rangeEnd", where, subnet) or whole.high
    if int(low) > int(high):
        raise _wrong(f"{where}.rangeEnd", str(high), f"at least {low}")
    return Range(subnet, low, high, _within(raw, "gateway", where, subnet))


def _within(raw: Mapping[str, Any], key: str, where: str, subnet: IpNetwork) -> IpAddress | None:
    text = _typed(raw, key, str, f"{where}.{key}")
    if not text:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        raise _wrong(f"{where}.{key}", text, f"an address in {subnet}") from None
    if address not in subnet:
        raise _wrong(f"{where}.{key}", text, f"an address in {subnet}")
    return address


def _excluded(raw: object) -> tuple[IpAddress, IpAddress]:
    try:
        network = ip_network(raw if isinstance(raw, str) else "", strict=False)
    except ValueError:
        raise _wrong("ipam.exclude", raw, "a list of addresses and prefixes") from None
    return network.network_address, network.broadcast_address


def _requested(
    runtime: Mapping[str, Any], cni_args: Mapping[str, Any], args: Mapping[str, str]
) -> tuple[IpAddress, ...]:
    """The addresses asked for, from the best of the three places that names any."""
    asked, where = _typed(runtime, "ips", list, "runtimeConfig.ips"), "runtimeConfig.ips"
    if not asked:
        asked, where = _typed(cni_args, "ips", list, "args.cni.ips"), "args.cni.ips"
    if not asked and args.get("IP"):
        asked, where = args["IP"].split(","), "IP in CNI_ARGS"
    wanted: list[IpAddress] = []
    for item in asked or []:
        try:
            wanted.append(ip_interface(item if isinstance(item, str) else "").ip)
        except ValueError:
            raise _wrong(where, item, "addresses, with or without a prefix length") from None
    return tuple(dict.fromkeys(wanted))


def _mac(runtime: Mapping[str, Any], cni_args: Mapping[str, Any], args: Mapping[str, str]) -> str:
    mac = (
        _typed(runtime, "mac", str, "runtimeConfig.mac")
        or _typed(cni_args, "mac", str, "args.cni.mac")
        or args.get("MAC", "")
    ).lower()
    if mac and (not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00"):
        raise _wrong("mac", mac, "six octets of a unicast address such as 02:00:5e:10:00:01")
    return mac


def _mtu(config: Mapping[str, Any]) -> int | None:
    mtu = _typed(config, "mtu", int, "mtu")
    if mtu and mtu < MIN_MTU:
        raise _wrong("mtu", mtu, f"at least {MIN_MTU}")
    return mtu or None


def _dns(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result's dns: the configuration's, overridden by the capability, whose names differ."""
    asked = _typed(runtime, "dns", dict, "runtimeConfig.dns") or {}
    names = {"servers": "nameservers", "searches": "search", "options": "options"}
    given = {names[key]: asked[key] for key in names if asked.get(key)}
    for key, values in given.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise _wrong(f"runtimeConfig.dns ({key})", values, "a list of strings")
    return dict(config.get("dns") or {}) | given


def _quarantine(ipam: Mapping[str, Any]) -> float:
    seconds = ipam.get("quarantineSeconds")
    if seconds is None:
        return QUARANTINE_S
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= _DAY_S:
        raise _wrong("ipam.quarantineSeconds", seconds, f"a number from 0 to {_DAY_S}")
    return float(seconds)


def _aliases(runtime: Mapping[str, Any]) -> tuple[str, ...]:
    names = _typed(runtime, "aliases", list, "runtimeConfig.aliases") or []
    for name in names:
        if not (isinstance(name, str) and _ALIAS.fullmatch(name)):
            raise _wrong("runtimeConfig.aliases", name, "a list of DNS names")
    return tuple(dict.fromkeys(names))


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _typed(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """`raw[key]`, None when absent or null."""
    value = raw.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        names = {dict: "an object", list: "a list", str: "a string", int: "a number"}
        raise _wrong(where, value, names[kind])
    return value


def _refuse_unknown(raw: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f"{where}.{key} is {_shown(raw[key])}, unsupported: known are {', '.join(sorted(known))}",
            )


def _wrong(where: str, value: object, allowed: str) -> CniError:
    return CniError(Code.INVALID_CONFIG, f"{where} is {_shown(value)}; it must be {allowed}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
