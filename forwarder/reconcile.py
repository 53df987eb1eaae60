"""What podloom wants of the kernel, and the operations that get there from what is installed. Pure.

Everything of ours carries our mark: links an alias that begins with ALIAS_PREFIX, routes the protocol
number ROUTE_PROTOCOL. What lacks the mark is somebody else's: it is never changed, and where it stands
in the way that is an error. What hangs on a link of ours (addresses, neighbours) is ours with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final, TypeAlias

from forwarder.addresses import VIRTUAL_ROUTER, Address, Network, format_mac, gateway_of

ALIAS_PREFIX: Final = "podloom:"

ROUTE_PROTOCOL: Final = 71
"""rtm_protocol of our routes. Below 5 are the kernel's and the administrator's; 71 is neither in iproute2's
rt_protos nor used by the routing and pod network daemons known to set one (kube-router 17, Calico 80,
FRR 186 to 198)."""

Interface: TypeAlias = IPv4Interface | IPv6Interface


@dataclass(frozen=True, slots=True)
class Link:
    """`settings` are of the link itself, `port` of the link as a bridge's port; names are netlink's.
    Of a wanted link only the settings named matter, and those are set in their order."""

    kind: str
    alias: str
    mac: str | None = None
    mtu_bytes: int = 0
    queue_frames: int | None = None
    up: bool = True
    master: str | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    port: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route of the main table. `mtu_bytes` is None where the link's counts, `metric` where the
    kernel's default does."""

    destination: Network
    link: str | None
    gateway: Address | None
    source: Address | None
    onlink: bool
    protocol: int
    mtu_bytes: int | None = None
    metric: int | None = None

    @property
    def key(self) -> tuple[Network, int | None]:
        """What there can be one route of."""
        return self.destination, self.metric


@dataclass(frozen=True, slots=True)
class KernelState:
    """Links by name; addresses, permanent neighbours (address -> MAC) and static FDB entries (MACs) by
    link; routes; sysctls by their path below /proc/sys."""

    links: Mapping[str, Link] = field(default_factory=dict)
    addresses: Mapping[str, frozenset[Interface]] = field(default_factory=dict)
    neighbours: Mapping[str, Mapping[Address, str]] = field(default_factory=dict)
    fdb: Mapping[str, frozenset[str]] = field(default_factory=dict)
    routes: frozenset[Route] = frozenset()
    sysctls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wiring:
    """One node's place in its kernel. `extra_addresses` are the bridge's beside the gateways. Of a host
    without IPv6, or without br_netfilter loaded, nothing is asked that needs it."""

    node_id: str
    bridge: str
    tap: str
    tap_queue_frames: int
    mtu_bytes: int
    router_mac: bytes
    gateway_mac: bytes
    prefixes: tuple[Network, ...]
    cluster_cidrs: tuple[Network, ...]
    ipv6_available: bool
    bridge_netfilter: bool
    open_links: tuple[str, ...] = ()
    """The underlay's, where pods' packets come by them without a tunnel."""
    strict_links: tuple[str, ...] = ()
    """Of those the ones that take IPv4 packets only where the way back leads."""
    extra_addresses: tuple[Address, ...] = ()

    @property
    def usable_extra_addresses(self) -> tuple[Address, ...]:
        return tuple(address for address in self.extra_addresses if address.version in self.families)

    @property
    def usable_prefixes(self) -> tuple[Network, ...]:
        return tuple(prefix for prefix in self.prefixes if prefix.version == 4 or self.ipv6_available)

    @property
    def families(self) -> frozenset[int]:
        return frozenset(prefix.version for prefix in self.usable_prefixes)


def wanted(wiring: Wiring) -> KernelState:
    """The state in which this node's pods and the pump reach each other."""
    alias = ALIAS_PREFIX + wiring.node_id
    bridge, tap, router_mac = wiring.bridge, wiring.tap, format_mac(wiring.router_mac)
    return KernelState(
        links={
            bridge: Link(
                kind="bridge",
                alias=alias,
                mac=format_mac(wiring.gateway_mac),
                mtu_bytes=wiring.mtu_bytes,
                settings={"br_stp_state": 0, "br_mcast_snooping": 0, "br_forward_delay": 0},
            ),
            tap: Link(
                kind="tun",
                alias=alias,
                mtu_bytes=wiring.mtu_bytes,
                queue_frames=wiring.tap_queue_frames,
                master=bridge,
                # The pump takes what is addressed to the router MAC and nothing else, so nothing is flooded.
                port={"isolated": 1, "learning": 0, "unicast_flood": 0, "mcast_flood": 0, "bcast_flood": 0},
            ),
        },
        addresses={bridge: frozenset(_bridge_addresses(wiring))},
        neighbours={bridge: {VIRTUAL_ROUTER[version]: router_mac for version in wiring.families}},
        fdb={tap: frozenset({router_mac})},
        routes=frozenset(_cluster_routes(wiring)),
        sysctls=_sysctls(wiring),
    )


def _bridge_addresses(wiring: Wiring) -> Iterator[Interface]:
    for prefix in wiring.usable_prefixes:
        yield ip_interface((gateway_of(prefix), prefix.prefixlen))
    for address in wiring.usable_extra_addresses:
        yield ip_interface(address)


def _cluster_routes(wiring: Wiring) -> Iterator[Route]:
    for cidr in wiring.cluster_cidrs:
        if cidr in wiring.prefixes:
            continue  # The whole cluster is this node: the kernel's connected route already covers it.
        prefixes = [prefix for prefix in wiring.usable_prefixes if prefix.version == cidr.version]
        if not prefixes:
            continue  # Without an address of that version the host has nothing to send from.
        inside = [prefix for prefix in prefixes if prefix.network_address in cidr]
        yield Route(
            destination=cidr,
            link=wiring.bridge,
            gateway=VIRTUAL_ROUTER[cidr.version],
            source=gateway_of((inside or prefixes)[0]),
            onlink=True,
            protocol=ROUTE_PROTOCOL,
        )


def _sysctls(wiring: Wiring) -> dict[str, str]:
    bridge, tap = wiring.bridge, wiring.tap
    # The TAP is a wire, not a host: no address, no router solicitation towards the pump.
    values = {f"net/ipv6/conf/{tap}/disable_ipv6": "1"} if wiring.ipv6_available else {}
    if 4 in wiring.families:
        values |= {
            "net/ipv4/ip_forward": "1",
            # Pods are on one segment but isolated: a redirect would send them where they cannot go. The
            # kernel sends them if either of the two says so.
            "net/ipv4/conf/all/send_redirects": "0",
            f"net/ipv4/conf/{bridge}/send_redirects": "0",
            f"net/ipv4/conf/{bridge}/accept_redirects": "0",
            # Loose: the kernel takes the greater of `all` and the link's own, so 0 would not win. A pod's
            # reply may leave by another link than the request came in, as behind a node port.
            f"net/ipv4/conf/{bridge}/rp_filter": "2",
        }
    if 6 in wiring.families:
        values |= {
            f"net/ipv6/conf/{bridge}/disable_ipv6": "0",
            f"net/ipv6/conf/{bridge}/accept_ra": "0",
            f"net/ipv6/conf/{bridge}/autoconf": "0",
            f"net/ipv6/conf/{bridge}/accept_redirects": "0",
            # The gateway's addresses are nobody else's by configuration; DAD would only delay them.
            f"net/ipv6/conf/{bridge}/accept_dad": "0",
            "net/ipv6/conf/all/forwarding": "1",
        }
    for link in wiring.open_links:
        if 4 in wiring.families:
            values[f"net/ipv4/conf/{link}/forwarding"] = "1"
        if 6 in wiring.families:
            values[f"net/ipv6/conf/{link}/forwarding"] = "1"
    # Loose: while one node sends by the tunnel already and the other does not yet, ways differ.
    values |= {f"net/ipv4/conf/{link}/rp_filter": "2" for link in wiring.strict_links if 4 in wiring.families}
    if wiring.bridge_netfilter:
        # Pods are routed: what they send passes iptables in the IP stack anyway. br_netfilter would rewrite
        # a Service's address on the bridge already and hand the frame to the other pod's port, where
        # isolation ends it. The kernel filters a bridge if this or the bridge's own attribute says so, so 0
        # there would not win; another bridge that is to be filtered can say 1 for itself.
        switches = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}
        values |= {f"net/bridge/{switches[version]}": "0" for version in sorted(wiring.families)}
    return values


@dataclass(frozen=True, slots=True)
class CreateBridge:
    name: str
    link: Link

    def __str__(self) -> str:
        return f"create bridge {self.name}"


@dataclass(frozen=True, slots=True)
class SetLink:
    """Everything of the link but whether it is up; only what differs from `current` need be set."""

    name: str
    link: Link
    current: Link | None

    def __str__(self) -> str:
        return f"configure link {self.name}"


@dataclass(frozen=True, slots=True)
class SetUp:
    name: str

    def __str__(self) -> str:
        return f"bring up link {self.name}"


@dataclass(frozen=True, slots=True)
class WriteSysctl:
    path: str
    value: str

    def __str__(self) -> str:
        return f"set sysctl {self.path.replace('/', '.')} = {self.value}"


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    link: str
    address: Interface

    def __str__(self) -> str:
        return f"remove address {self.address} from {self.link}"


@dataclass(frozen=True, slots=True)
class AddAddress:
    link: str
    address: Interface

    def __str__(self) -> str:
        return f"add address {self.address} to {self.link}"


@dataclass(frozen=True, slots=True)
class PutNeighbour:
    link: str
    address: Address
    mac: str

    def __str__(self) -> str:
        return f"set neighbour {self.address} of {self.link} to {self.mac}"


@dataclass(frozen=True, slots=True)
class PutFdb:
    link: str
    mac: str

    def __str__(self) -> str:
        return f"set forwarding entry {self.mac} to {self.link}"


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    route: Route

    def __str__(self) -> str:
        return f"remove route {self.route.destination} from {self.route.link}"


@dataclass(frozen=True, slots=True)
class PutRoute:
    route: Route

    def __str__(self) -> str:
        return f"set route {self.route.destination} to {self.route.link}"


Operation: TypeAlias = (
    CreateBridge
    | SetLink
    | SetUp
    | WriteSysctl
    | RemoveAddress
    | AddAddress
    | PutNeighbour
    | PutFdb
    | RemoveRoute
    | PutRoute
)


Removal: TypeAlias = RemoveAddress | RemoveRoute


class ForeignError(RuntimeError):
    """Something that is not ours stands where ours must be; one sentence for each."""


def is_ours(link: Link, mac: str | None = None) -> bool:
    """Whether a link carries our mark. Between its creation and the alias a bridge has only its derived
    MAC to show, so `mac` is a mark too."""
    return link.alias.startswith(ALIAS_PREFIX) or (mac is not None and link.mac == mac)


def reconcile(wanted: KernelState, installed: KernelState) -> tuple[Operation, ...]:
    """The operations that lead from `installed` to `wanted`, in the order in which they are possible;
    none if all is well. ForeignError if something of others is in the way."""
    foreign = [*_foreign_links(wanted, installed), *_foreign_routes(wanted, installed)]
    if foreign:
        raise ForeignError("; ".join(foreign))
    return (
        *_create_links(wanted, installed),
        # A link's sysctls exist only while its MTU suits IPv6, and count from the moment it is up.
        *_set_links(wanted, installed),
        *_write_sysctls(wanted, installed),
        *_bring_up(wanted, installed),
        *(RemoveRoute(route) for route in _stale_routes(wanted, installed)),
        *_addresses(wanted, installed),
        *_entries(wanted, installed),
        *(PutRoute(route) for route in sorted(wanted.routes - installed.routes, key=_by_destination)),
    )


def _foreign_links(wanted: KernelState, installed: KernelState) -> Iterator[str]:
    for name, link in wanted.links.items():
        current = installed.links.get(name)
        if current is None:
            continue
        if current.kind != link.kind:
            kind = current.kind or "plain"
            yield f"link {name} is somebody's {kind} link: remove it or choose another name in [links]"
        elif not is_ours(current, link.mac):
            yield f"link {name} was not made by podloom: remove it or choose another name in [links]"


def _foreign_routes(wanted: KernelState, installed: KernelState) -> Iterator[str]:
    keys = {route.key for route in wanted.routes}
    for route in sorted(installed.routes, key=_by_destination):
        if route.key in keys and route.protocol != ROUTE_PROTOCOL:
            yield (
                f"route {route.destination} dev {route.link} was not made by podloom (protocol "
                f"{route.protocol}): remove it or change cluster.cidrs"
            )


def _create_links(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for name, link in wanted.links.items():
        if link.kind == "bridge" and name not in installed.links:
            yield CreateBridge(name, link)


def _set_links(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for name, link in wanted.links.items():
        current = installed.links.get(name)
        if current is None or not _satisfies(current, link):
            yield SetLink(name, link, current)


def _write_sysctls(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for path, value in wanted.sysctls.items():
        if installed.sysctls.get(path) != value:
            yield WriteSysctl(path, value)


def _bring_up(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for name, link in wanted.links.items():
        current = installed.links.get(name)
        if link.up and (current is None or not current.up):
            yield SetUp(name)


def _satisfies(current: Link, link: Link) -> bool:
    return (
        (current.alias, current.mtu_bytes, current.master) == (link.alias, link.mtu_bytes, link.master)
        and link.mac in (None, current.mac)
        and link.queue_frames in (None, current.queue_frames)
        and link.settings.items() <= current.settings.items()
        and link.port.items() <= current.port.items()
    )


def _stale_routes(wanted: KernelState, installed: KernelState) -> list[Route]:
    keys = {route.key for route in wanted.routes}
    return sorted(
        (
            route
            for route in installed.routes
            if route.protocol == ROUTE_PROTOCOL and route.link in wanted.links and route.key not in keys
        ),
        key=_by_destination,
    )


def _addresses(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for link, addresses in wanted.addresses.items():
        current = installed.addresses.get(link, frozenset())
        # Removal first: two prefix lengths of one address cannot be told apart by the kernel's routes.
        yield from (RemoveAddress(link, address) for address in sorted(current - addresses, key=str))
        yield from (AddAddress(link, address) for address in sorted(addresses - current, key=str))


def _entries(wanted: KernelState, installed: KernelState) -> Iterator[Operation]:
    for link, macs in wanted.fdb.items():
        yield from (PutFdb(link, mac) for mac in sorted(macs - installed.fdb.get(link, frozenset())))
    for link, neighbours in wanted.neighbours.items():
        current = installed.neighbours.get(link, {})
        for address, mac in neighbours.items():
            if current.get(address) != mac:
                yield PutNeighbour(link, address, mac)


def _by_destination(route: Route) -> tuple[int, str]:
    return route.destination.version, str(route.destination)
