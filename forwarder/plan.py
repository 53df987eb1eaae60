"""What one configuration means for each part of the daemon, and what of it may change while running. Pure
but for `plan_wiring`, which asks the host for its families."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Final

from forwarder import links, underlay
from forwarder.addresses import Address, Network, gateway_of
from forwarder.config import SECTIONS, Config, DiscoveryConfig
from forwarder.dataplane import Settings
from forwarder.direct import Settings as DirectSettings
from forwarder.names.etcd import PODS_SOURCE, SERVICES_SOURCE
from forwarder.names.settings import Settings as NamesSettings
from forwarder.node import gateway_mac
from forwarder.offloads import ABOUT
from forwarder.paths import MIN_IPV6_MTU_BYTES
from forwarder.peers import OPTION_BYTES, OVERHEAD_BYTES
from forwarder.process import StartError
from forwarder.reconcile import Wiring
from forwarder.underlay import Host

log = logging.getLogger("podloom")

MIN_IPV4_MTU_BYTES: Final = 576

UNDERLAY_KEYS: Final = {"node.endpoints", "node.device", "tunnel.underlay_mtu_bytes"}
"""Where the node is on the underlay, which may change without the configuration too."""

CHANGEABLE: Final = {
    *UNDERLAY_KEYS,
    "tunnel.encapsulation",
    "links.keep_on_exit",
    *(f"discovery.{item.name}" for item in fields(DiscoveryConfig)),
    "peers",
    "services",
    *(f"offload.{name}" for name in ABOUT if name != "uplink"),
}
"""What SIGHUP and `reload` take over while running. The rest names sockets and links that traffic uses."""


EXPECTED: Final = {
    "static": (),
    "etcd": (SERVICES_SOURCE, PODS_SOURCE),
    "kubernetes": ("kubernetes",),
}
"""By discovery.source, the sources of names without which nothing is said not to exist."""


def with_prefixes(config: Config, prefixes: tuple[Network, ...]) -> Config:
    return replace(config, node=replace(config.node, prefixes=prefixes))


def with_endpoints(config: Config, host: Host, current: Sequence[Address] = ()) -> Config:
    """The configuration with the addresses that its device has. UnderlayError if it has none."""
    if not config.node.device:
        return config
    outside = underlay.endpoints_of(config.node.device, host, config.cluster.cidrs, current)
    return replace(config, node=replace(config.node, endpoints=outside))


def device_mtus(config: Config, host: Host, before: Mapping[int, int] | None = None) -> dict[int, int]:
    """By IP version what the underlay carries. UnderlayError as `underlay.device_mtus`."""
    if fixed := config.tunnel.underlay_mtu_bytes:
        return {endpoint.version: fixed for endpoint in config.node.endpoints}
    return underlay.device_mtus(config.node.endpoints, host, before)


def inner_mtus(config: Config, device_mtus: Mapping[int, int]) -> dict[int, int]:
    """By the underlay's IP version the largest inner IP packet."""
    option_bytes = OPTION_BYTES if config.tunnel.remote_checksum else 0
    return {version: mtu - OVERHEAD_BYTES[version] - option_bytes for version, mtu in device_mtus.items()}


def pod_mtu_bytes(mtus: Mapping[int, int], families: Collection[int]) -> int:
    """The pods' MTU while running. Less than IPv6 needs would take IPv6 from them, and less than IPv4 needs
    is nothing that a host must take (RFC 791): what does not fit then is dropped on its way to a peer."""
    return max(min(mtus.values()), MIN_IPV6_MTU_BYTES if 6 in families else MIN_IPV4_MTU_BYTES)


def plan_wiring(config: Config, host: Host, mtus: Mapping[int, int]) -> Wiring:
    """The node's place in its kernel. StartError if pods cannot live there."""
    assert config.node.id is not None  # noqa: S101 (identified)
    assert config.node.router_mac is not None  # noqa: S101
    wiring = Wiring(
        node_id=config.node.id,
        bridge=config.links.bridge,
        tap=config.links.tap,
        tap_queue_frames=config.links.tap_queue_frames,
        mtu_bytes=min(mtus.values()),
        router_mac=config.node.router_mac,
        gateway_mac=gateway_mac(config.node.id),
        prefixes=config.node.prefixes,
        cluster_cidrs=config.cluster.cidrs,
        extra_addresses=config.names.addresses if config.names.enabled else (),
        ipv6_available=links.ipv6_available(),
        bridge_netfilter=links.bridge_netfilter(),
        **underlay_links(config, host),
    )
    if not wiring.usable_prefixes:
        raise StartError(
            "node.prefixes holds only IPv6 and this host has none: enable IPv6 or add an IPv4 prefix"
        )
    if wiring.usable_prefixes != wiring.prefixes:
        log.warning("this host has no IPv6: its pods get IPv4 only")
    if 6 in wiring.families and wiring.mtu_bytes < MIN_IPV6_MTU_BYTES:
        raise StartError(
            f"the underlay leaves pods an MTU of {wiring.mtu_bytes}, and IPv6 needs {MIN_IPV6_MTU_BYTES}: "
            "raise the underlay's MTU or use only IPv4 prefixes"
        )
    return wiring


def underlay_links(config: Config, host: Host) -> dict[str, Any]:
    """Of the wiring: the links by which pods' packets may come without a tunnel, and those of them whose
    filter would drop some."""
    if config.underlay.direct == "off" and config.bgp.include is None:
        return {}
    names = tuple(
        device.name for device in host.devices if not set(config.node.endpoints).isdisjoint(device.addresses)
    )
    return {"open_links": names, "strict_links": tuple(filter(links.filters_strictly, names))}


def direct_settings(config: Config, wiring: Wiring) -> DirectSettings | None:
    """None if nothing but the tunnel is to be used."""
    if config.underlay.direct == "off" and config.bgp.include is None:
        return None
    return DirectSettings(
        endpoints=config.node.endpoints,
        prefixes=wiring.usable_prefixes,
        cluster_cidrs=wiring.cluster_cidrs,
        mtu_bytes=wiring.mtu_bytes,
        port=config.underlay.bfd_port,
        direct=config.underlay.direct == "auto",
        routing_protocol=config.bgp.route_protocol if config.bgp.include else None,
    )


def data_plane_settings(config: Config, wiring: Wiring) -> Settings:
    return Settings(
        router_mac=wiring.router_mac,
        gateway_mac=wiring.gateway_mac,
        vni=config.cluster.vni,
        prefixes=wiring.usable_prefixes,
        endpoints=config.node.endpoints,
        listen=(
            (config.tunnel.geneve_port, "geneve"),
            *((port, "vxlan") for port in config.tunnel.vxlan_ports),
        ),
        vxlan_reserved_bits=config.tunnel.vxlan_reserved_bits,
        mtu_bytes=wiring.mtu_bytes,
        offloads={name: on for name, on in asdict(config.offload).items() if name != "uplink"},
    )


def names_settings(config: Config, wiring: Wiring) -> NamesSettings:
    addresses = dns_addresses(wiring) + tuple(map(str, wiring.usable_extra_addresses))
    clients = (*wiring.usable_prefixes, *config.node.endpoints, *addresses, "127.0.0.0/8", "::1")
    return NamesSettings(
        domain=config.names.domain,
        addresses=addresses,
        networks=tuple(map(str, config.cluster.cidrs)),
        clients=tuple(map(str, clients)),
        upstream=config.names.upstream,
        expected=EXPECTED[config.discovery.source],
        queries_per_second=config.names.queries_per_second,
        cache_bytes=config.names.cache_bytes,
    )


def dns_addresses(wiring: Wiring) -> tuple[str, ...]:
    return tuple(str(gateway_of(prefix)) for prefix in wiring.usable_prefixes)


def dns_result(config: Config, wiring: Wiring) -> dict[str, Any]:
    """What pods are told of the resolver, in the words of a CNI result; nothing where there is none."""
    if not config.names.enabled:
        return {}
    return {
        "nameservers": list(dns_addresses(wiring)),
        "search": [f"svc.{config.names.domain}", config.names.domain],
    }


def changed_keys(old: Config, new: Config) -> dict[str, Any]:
    """The keys whose values differ, with the new value."""
    changed: dict[str, Any] = {}
    for section in SECTIONS:
        before, after = getattr(old, section), getattr(new, section)
        for item in fields(after):
            if getattr(before, item.name) != getattr(after, item.name):
                changed[f"{section}.{item.name}"] = getattr(after, item.name)
    for name in ("peers", "services"):
        if getattr(old, name) != getattr(new, name):
            changed[name] = getattr(new, name)
    return changed
