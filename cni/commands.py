"""The CNI verbs as straight steps. What a step made is undone, last first, when a later one fails."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network
from typing import Any

from cni import bpf, delegate, guard, netlink, netns
from cni.ipam import IpAddress, IpNetwork, RangeSet
from cni.netconf import (
    MIN_IPV6_MTU,
    OWN_IPAM,
    NetConf,
    ipam_type_of,
    parse_netconf,
    pools_for,
    quarantine_of,
)
from cni.netlink import Link, Netlink, VethEnd
from cni.request import Attachment, Request
from cni.result import CniError, Code, Interface, Ip, Result, Route
from cni.store import (
    AddressNotOursError,
    AddressTakenError,
    Holder,
    Lease,
    PoolExhaustedError,
    Record,
    Store,
)

ALIAS_MARK = "podloom "
"""How the ifalias of every host end begins: it tells our links from others'."""
_ALIAS_MAX = 255  # IFALIASZ less the closing NUL, linux/if.h

_ANYWHERE: dict[int, IpAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}

NO_GUARD = (
    "this kernel cannot hold pods to their own addresses, which takes eBPF traffic control programs "
    '(CONFIG_NET_CLS_BPF); "spoofCheck": false in the configuration does without'
)

_LATER_METRIC = 2048  # worse than IPv6's default of 1024 (IP6_RT_PRIO_USER, net/ip6_route.h)

# In the pod. Neither routers nor neighbours may change its routes, and it must not wait for DAD on start.
_POD_SYSCTLS = {
    "ipv4.accept_redirects": 0,
    "ipv6.accept_ra": 0,
    "ipv6.accept_redirects": 0,
    "ipv6.accept_dad": 0,
}
# A bridge port needs no addresses of its own, and must not get any from what a pod sends.
_CARRIER_SECONDS = 2.0  # the kernel looks at most a second apart
_PORT_SYSCTLS = {"ipv6.disable_ipv6": 1, "ipv6.accept_ra": 0}


@dataclass(frozen=True)
class NodeNetwork:
    """What the daemon knows of this node: one gateway (the bridge's own address) for each prefix."""

    bridge: str
    mtu: int  # of the pods' links, bytes
    prefixes: tuple[IpNetwork, ...]
    gateways: tuple[IpAddress, ...]
    cluster_cidrs: tuple[IpNetwork, ...]
    gso_max_segs: int | None = None  # of what pods send; None: leave the kernel's default
    dns: Mapping[str, Any] = field(default_factory=dict)  # for pods whose configuration gives none
    tunnel_ports: tuple[int, ...] = (6081, 4789, 8472)  # UDP; pods may not send to them on nodes
    tap: str = ""  # the bridge's port to the other nodes; empty: not looked at
    serves_names: bool = False  # whether pods' aliases are answered

    def range_sets(self, conf: NetConf) -> tuple[RangeSet, ...]:
        """What an attachment gets addresses from. A dual-stack node without IPv6 still serves IPv4."""
        found = pools_for(conf, self.prefixes, self.gateways)
        if not netlink.ipv6_present():
            found = tuple(range_set for range_set in found if range_set[0].low.version == 4)
        if not found:
            raise CniError(Code.TRY_AGAIN_LATER, "this node has no prefix that its kernel could serve")
        return found


@dataclass(frozen=True)
class _Given:
    """What an attachment got. Without routes from an IPAM plugin, everything goes through the gateways."""

    leases: tuple[Lease, ...]
    routes: tuple[netlink.Route, ...] | None = None
    dns: Mapping[str, Any] | None = None


def add(
    request: Request, network: NodeNetwork, store: Store, host: Netlink, clock: Callable[[], float]
) -> Result:
    """Wire the pod's interface and give it its addresses; nothing is left behind when this raises.

    Each undo is registered before its step, because a step that raises may still have been done.
    """
    attachment = request.attachment
    conf = parse_netconf(request.config or {}, request.args or {})
    if conf.aliases and not network.serves_names:
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            f"runtimeConfig.aliases is {list(conf.aliases)}, unsupported: names.enabled is false here",
        )
    mtu = _mtu(conf, network)
    with _opened_netns(request) as netns_fd, netns.call_in(netns_fd, Netlink) as pod, ExitStack() as undo:
        _refuse_existing(request, store, host, pod, clock())
        bridge = host.find_link(network.bridge)
        if bridge is None:
            raise CniError(
                Code.TRY_AGAIN_LATER, f"the bridge {network.bridge} is missing; is `podloom up` running?"
            )
        undo.callback(store.release, attachment, clock(), conf.quarantine_s)
        given = _reserve(request, conf, network, store, clock())
        mac = conf.mac or (_mac_of(given.leases) if given else _mac("02", _digest(attachment)))

        # What comes to the pod was merged by rules of others': no limit, or it would be cut again.
        ours = VethEnd(host_ifname_of(attachment), _mac_of_port(attachment), mtu)
        theirs = VethEnd(request.ifname, mac, mtu, network.gso_max_segs)
        undo.callback(delete_port, attachment, host)
        host.add_veth(ours, theirs, netns_fd, bridge.index)
        netlink.set_link_sysctls(ours.name, _PORT_SYSCTLS)
        netns.call_in(netns_fd, netlink.set_link_sysctls, request.ifname, _POD_SYSCTLS)
        if given is None:
            # The dhcp plugin talks through the link, so it must be there and carry.
            host.set_port_up(ours.name, alias_of(attachment))
            pod.set_up(request.ifname)
            host.wait_forwarding(ours.name, _CARRIER_SECONDS)
            undo.callback(_undelegate, request, conf.ipam_type)
            given = _delegated(request, conf, network)
            store.hold(attachment, given.leases)
        if conf.spoof_check:
            _attach_guard(host, ours.name, mac, given.leases, network, dhcp=conf.ipam_type == "dhcp")
        host.set_port_up(ours.name, alias_of(attachment))
        routes = _configure_pod(pod, request.ifname, given, netns_fd)
        host.wait_forwarding(ours.name, _CARRIER_SECONDS)

        store.complete(attachment, clock())
        undo.pop_all()
    made = Result(
        interfaces=(
            Interface(ours.name, ours.mac, "", ours.mtu),
            Interface(theirs.name, theirs.mac, request.netns, theirs.mtu),
        ),
        ips=tuple(
            Ip(f"{lease.address}/{lease.address.max_prefixlen}", str(lease.gateway), 1)
            for lease in given.leases
        ),
        routes=routes,
        dns=conf.dns or given.dns or network.dns,
    )
    return request.previous.followed_by(made) if request.previous else made


def delete(request: Request, store: Store, host: Netlink, now: float) -> None:
    """Remove the interface and release its addresses. Succeeds when there is nothing left to do.

    The link goes first: an address must not be given out again while a link still carries it. When the
    IPAM plugin fails the record stays, so that the call can be repeated.
    """
    ipam_type = ipam_type_of(request.config or {})
    delete_port(request.attachment, host)
    if ipam_type != OWN_IPAM:
        delegate.call(ipam_type, request)
    store.release(request.attachment, now, quarantine_of(request.config or {}))


def check(request: Request, store: Store, host: Netlink) -> None:
    """CniError naming the first thing that is not as ADD left it; what later plugins added is theirs."""
    if request.previous is None:
        raise CniError(Code.INVALID_CONFIG, "CHECK needs prevResult in the network configuration")
    record = store.find(request.attachment)
    if record is None or record.attached_at is None:
        raise _failed(f"no address is held for {_shown(request.attachment)}")
    promised = {ip.address for ip in request.previous.ips}
    for lease in record.leases:
        if f"{lease.address}/{lease.address.max_prefixlen}" not in promised:
            raise _failed(f"{lease.address} is held for {_shown(request.attachment)} but not in prevResult")
    conf = parse_netconf(request.config or {}, request.args or {})
    with _opened_netns(request) as netns_fd, netns.call_in(netns_fd, Netlink) as pod:
        port = _checked_port(host, record)
        if conf.spoof_check and not _is_guarded(host, port):
            raise _failed(f"{port.name} has lost its anti-spoofing program")
        _check_pod(pod, request.ifname, port, record, with_routes=not conf.delegated)
    if conf.delegated:
        delegate.call(conf.ipam_type, request)


def host_ifname_of(attachment: Attachment) -> str:
    """The host end's name, known without any record: 44 bits of a hash, so a clash is just an error."""
    return "pl" + _digest(attachment)[:11]


def alias_of(attachment: Attachment) -> str:
    return f"{ALIAS_MARK}{_shown(attachment)}"[:_ALIAS_MAX]


@contextmanager
def _opened_netns(request: Request) -> Iterator[int]:
    """The descriptor of CNI_NETNS, which must be a network namespace and not our own."""
    try:
        netns_fd = os.open(request.netns, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a FIFO
    except (OSError, ValueError) as error:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS cannot be opened: {error}") from None
    try:
        if not netns.is_netns(netns_fd):
            raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns} is not a network namespace")
        if netns.is_own(netns_fd) and not request.netns_override:
            raise CniError(
                Code.INVALID_NETNS,
                f"CNI_NETNS {request.netns} is the node's own network namespace; "
                "set CNI_NETNS_OVERRIDE=1 if that is meant",
            )
        yield netns_fd
    finally:
        os.close(netns_fd)


def _refuse_existing(request: Request, store: Store, host: Netlink, pod: Netlink, now: float) -> None:
    """A second ADD is an error; the remains of one that was killed half way are cleared away."""
    attachment = request.attachment
    record = store.find(attachment)
    if record is not None and record.attached_at is not None:
        raise CniError(Code.ALREADY_ATTACHED, f"{_shown(attachment)} is attached already; DEL comes first")
    if record is not None:
        delete_port(attachment, host)
        _undelegate(request, ipam_type_of(request.config or {}))
        store.release(attachment, now)
    if pod.find_link(attachment.ifname) is not None:
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"CNI_IFNAME {attachment.ifname} exists already in the pod's namespace"
        )
    port = host.find_link(host_ifname_of(attachment))
    if port is not None and not is_port_of(attachment, port):
        raise CniError(Code.KERNEL_REFUSED, f"{port.name} exists and is not ours: {port.alias or port.kind}")
    if port is not None:  # left over without a record; its other end is not in this pod
        host.delete_link(port.name)


def _mtu(conf: NetConf, network: NodeNetwork) -> int:
    mtu = conf.mtu or network.mtu
    least = MIN_IPV6_MTU if any(prefix.version == 6 for prefix in network.prefixes) else 0
    if not least <= mtu <= network.mtu:
        raise CniError(
            Code.INVALID_CONFIG, f"mtu is {mtu}; it must be {least or 'at least 68'} to {network.mtu} here"
        )
    return mtu


def _reserve(
    request: Request, conf: NetConf, network: NodeNetwork, store: Store, now: float
) -> _Given | None:
    """Make the record, with addresses of our own; None when an IPAM plugin is to give them."""
    args = request.args or {}
    holder = Holder(
        host_ifname_of(request.attachment),
        network.bridge,
        args.get("K8S_POD_NAMESPACE", ""),
        args.get("K8S_POD_NAME", ""),
        conf.mac,
        conf.aliases,
    )
    try:
        if conf.delegated:
            store.adopt(request.attachment, holder, now)
            return None
        return _Given(
            store.reserve(request.attachment, holder, network.range_sets(conf), now, conf.requested)
        )
    except (PoolExhaustedError, AddressTakenError) as error:
        raise CniError(Code.TRY_AGAIN_LATER, str(error)) from None
    except AddressNotOursError as error:
        raise CniError(Code.INVALID_CONFIG, str(error)) from None


def _delegated(request: Request, conf: NetConf, network: NodeNetwork) -> _Given:
    """What the IPAM plugin gives, made to fit a routed pod: each address alone, behind a gateway."""
    result = delegate.call(conf.ipam_type, request)
    leases = []
    for item in result.ips if result else ():
        try:
            address = ip_interface(item.address).ip
            gateway = ip_address(item.gateway) if item.gateway else None
        except ValueError as error:
            raise CniError(Code.INVALID_CONFIG, f"IPAM plugin {conf.ipam_type}: {error}") from None
        own = [pair for pair in zip(network.prefixes, network.gateways, strict=True) if address in pair[0]]
        if not own:
            raise CniError(
                Code.INVALID_CONFIG,
                f"IPAM plugin {conf.ipam_type} gave {address}, which is outside of this node's prefixes "
                f"{', '.join(map(str, network.prefixes))}: other nodes would not find it",
            )
        leases.append(Lease(address, gateway or own[0][1]))
    if result is None or not leases:
        raise CniError(Code.INVALID_CONFIG, f"IPAM plugin {conf.ipam_type} gave no address")
    return _Given(tuple(leases), _given_routes(conf.ipam_type, result, leases), result.dns)


def _given_routes(
    ipam_type: str, result: Result, leases: Sequence[Lease]
) -> tuple[netlink.Route, ...] | None:
    gateways = {lease.gateway.version: lease.gateway for lease in reversed(leases)}
    routes = []
    for item in result.routes:
        try:
            dst = ip_network(item.dst, strict=False)
            gateway = ip_address(item.gw) if item.gw else gateways.get(dst.version)
        except ValueError as error:
            raise CniError(Code.INVALID_CONFIG, f"IPAM plugin {ipam_type}: {error}") from None
        if gateway is not None:
            routes.append(netlink.Route(dst.network_address, dst.prefixlen, gateway))
    return tuple(routes) or None


def _undelegate(request: Request, ipam_type: str) -> None:
    if ipam_type != OWN_IPAM:
        delegate.call(ipam_type, request, "DEL")


def _attach_guard(
    host: Netlink, name: str, mac: str, leases: Sequence[Lease], network: NodeNetwork, *, dhcp: bool
) -> None:
    port = host.find_link(name)
    if port is None:
        raise CniError(Code.KERNEL_REFUSED, f"{name} vanished from the node")
    addresses = tuple(lease.address for lease in leases)
    allowed = guard.Allowance(mac, addresses, network.cluster_cidrs, network.tunnel_ports, dhcp)
    try:
        program = bpf.load(guard.program(allowed))
        try:
            if not bpf.attach_tcx(program, port.index):
                host.add_ingress_filter(port.index, program, bpf.NAME)
        finally:
            os.close(program)
    except (bpf.BpfError, netlink.NetlinkError) as error:
        raise CniError(Code.KERNEL_REFUSED, NO_GUARD, str(error)) from None


def _is_guarded(host: Netlink, port: Link) -> bool:
    return bpf.attached_to_tcx(port.index) or host.has_ingress_filter(port.index, bpf.NAME)


def _configure_pod(pod: Netlink, ifname: str, given: _Given, netns_fd: int) -> tuple[Route, ...]:
    """Addresses, link up, routes; returns the routes through a gateway as the result tells them."""
    link = pod.find_link(ifname)
    if link is None:
        raise CniError(Code.KERNEL_REFUSED, f"{ifname} vanished from the pod's namespace")
    if any(lease.address.version == 6 for lease in given.leases):
        netns.call_in(netns_fd, netlink.set_link_sysctls, ifname, {"ipv6.disable_ipv6": 0})
    for lease in given.leases:
        pod.add_address(link.index, lease.address)
    pod.set_up(ifname)
    made = []
    for route in _routes_of(given):
        metric = _add_route(pod, link.index, route)
        if route.gateway is not None:
            details = {"priority": metric} if metric else {}
            made.append(Route(f"{route.dst}/{route.length}", str(route.gateway), details))
    return tuple(made)


def _add_route(pod: Netlink, index: int, route: netlink.Route) -> int:
    """The metric it got: the first interface keeps the better one, a later one takes over when it goes."""
    if pod.add_route(index, route):
        return 0
    metric = _LATER_METRIC + index
    if not pod.add_route(index, route, metric):
        raise CniError(Code.KERNEL_REFUSED, f"a route to {route.dst} with metric {metric} exists in the pod")
    return metric


def _routes_of(given: _Given) -> tuple[netlink.Route, ...]:
    """Each gateway on the link, then what goes through it: the address alone has no neighbours."""
    gateways = dict.fromkeys(lease.gateway for lease in given.leases)
    on_link = (netlink.Route(gateway, gateway.max_prefixlen) for gateway in gateways)
    if given.routes is not None:
        return (*on_link, *given.routes)
    versions = {gateway.version: gateway for gateway in reversed(gateways)}
    default = (netlink.Route(_ANYWHERE[version], 0, versions[version]) for version in sorted(versions))
    return (*on_link, *default)


def delete_port(attachment: Attachment, host: Netlink) -> None:
    """Delete the host end, its peer with it. Another's link of that name is left alone."""
    port = host.find_link(host_ifname_of(attachment))
    if port is not None and is_port_of(attachment, port):
        netlink.delete_and_go_on(port.name)


def is_port_of(attachment: Attachment, port: Link) -> bool:
    """Whether a link of the host end's name is ours."""
    # An ADD killed between making the link and marking it leaves no alias.
    return port.kind == "veth" and port.alias in ("", alias_of(attachment))


def _checked_port(host: Netlink, record: Record) -> Link:
    name = record.host_ifname
    port, bridge = host.find_link(name), host.find_link(record.bridge)
    if port is None:
        raise _failed(f"{name}, the host end, is missing")
    if bridge is None or port.master != bridge.index:
        raise _failed(f"{name} is not a port of {record.bridge}")
    if not bridge.up:
        raise _failed(f"the pods' bridge {record.bridge} is down")
    if not port.up:
        raise _failed(f"{name}, the host end, is down")
    if not port.isolated:
        raise _failed(f"{name} is not an isolated port of {record.bridge}")
    return port


def _check_pod(pod: Netlink, ifname: str, port: Link, record: Record, *, with_routes: bool) -> None:
    link = pod.find_link(ifname)
    if link is None:
        raise _failed(f"{ifname} is missing in the pod")
    if port.peer != link.index or link.peer != port.index:
        raise _failed(f"{ifname} in the pod is not the other end of {port.name}")
    if not link.up:
        raise _failed(f"{ifname} in the pod is down")
    addresses, routes = pod.addresses(link.index), pod.routes(link.index)
    for lease in record.leases:
        if (lease.address, lease.address.max_prefixlen) not in addresses:
            raise _failed(f"{ifname} in the pod has lost its address {lease.address}")
    # Which routes an IPAM plugin gave is in prevResult, where later plugins may have changed them.
    for route in _routes_of(_Given(record.leases)) if with_routes else ():
        if route not in routes:
            raise _failed(f"the pod has no route to {route.dst}/{route.length} through {ifname}")


def _mac_of(leases: Sequence[Lease]) -> str:
    """The pod's MAC, from its first address: whoever gets that address next fits neighbours' old entries."""
    return _mac("02", hashlib.sha256(leases[0].address.packed).hexdigest())


def _mac_of_port(attachment: Attachment) -> str:
    """The host end's MAC; high, because a bridge without one of its own takes its lowest port's."""
    return _mac("fe", _digest(attachment))


def _mac(first: str, digest: str) -> str:
    return ":".join((first, *(digest[i : i + 2] for i in range(0, 10, 2))))


def _digest(attachment: Attachment) -> str:
    return hashlib.sha256(_shown(attachment).encode()).hexdigest()


def _shown(attachment: Attachment) -> str:
    # None of the three can contain a slash, so this names the attachment uniquely.
    return f"{attachment.network}/{attachment.container}/{attachment.ifname}"


def _failed(what: str) -> CniError:
    return CniError(Code.CHECK_FAILED, what)
