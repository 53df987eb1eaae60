"""The CNI verbs as straight steps. What a step made is undone, last first, when a later one fails."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from cni import netlink, netns
from cni.ipam import IpAddress, IpNetwork, Pool
from cni.netlink import Link, Netlink, VethEnd
from cni.request import Attachment, Request
from cni.result import CniError, Code, Interface, Ip, Result, Route
from cni.store import Lease, PoolExhaustedError, Record, Store

ALIAS_MARK = "podloom "
"""How the ifalias of every host end begins: it tells our links from others'."""
_ALIAS_MAX = 255  # IFALIASZ less the closing NUL, linux/if.h

_ANYWHERE: dict[int, IpAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}

_LATER_METRIC = 2048  # worse than IPv6's default of 1024 (IP6_RT_PRIO_USER, net/ip6_route.h)

# In the pod. Neither routers nor neighbours may change its routes, and it must not wait for DAD on start.
_POD_SYSCTLS = {
    "ipv4.accept_redirects": 0,
    "ipv6.accept_ra": 0,
    "ipv6.accept_redirects": 0,
    "ipv6.accept_dad": 0,
}
# A bridge port needs no addresses of its own, and must not get any from what a pod sends.
_PORT_SYSCTLS = {"ipv6.disable_ipv6": 1, "ipv6.accept_ra": 0}


@dataclass(frozen=True)
class NodeNetwork:
    """What the daemon knows of this node: one gateway (the bridge's own address) for each prefix."""

    bridge: str
    mtu: int  # of the pods' links, bytes
    prefixes: tuple[IpNetwork, ...]
    gateways: tuple[IpAddress, ...]
    cluster_cidrs: tuple[IpNetwork, ...]
    gso_max_segs: int | None = None  # None: leave the kernel's default

    def pools(self) -> tuple[Pool, ...]:
        return tuple(Pool.of_prefix(*pair) for pair in zip(self.prefixes, self.gateways, strict=True))


def add(request: Request, network: NodeNetwork, store: Store, host: Netlink, now: float) -> Result:
    """Wire the pod's interface and give it its addresses; nothing is left behind when this raises.

    Each undo is registered before its step, because a step that raises may still have been done.
    """
    attachment = request.attachment
    host_ifname = host_ifname_of(attachment)
    with _opened_netns(request) as netns_fd, netns.call_in(netns_fd, Netlink) as pod, ExitStack() as undo:
        _refuse_existing(attachment, store, host, pod)
        bridge = host.find_link(network.bridge)
        if bridge is None:
            raise CniError(
                Code.TRY_AGAIN_LATER, f"the bridge {network.bridge} is missing; is `podloom up` running?"
            )
        undo.callback(store.forget, attachment)
        leases = _reserve(request, host_ifname, network, store, now)

        ours = VethEnd(host_ifname, _mac_of_port(attachment), network.mtu, network.gso_max_segs)
        theirs = VethEnd(request.ifname, _mac_of(leases), network.mtu, network.gso_max_segs)
        undo.callback(_delete_port, attachment, host)
        host.add_veth(ours, theirs, netns_fd, bridge.index)
        netlink.set_link_sysctls(host_ifname, _PORT_SYSCTLS)
        host.set_port_up(host_ifname, alias_of(attachment))

        families = {lease.address.version for lease in leases}
        sysctls = _POD_SYSCTLS | ({"ipv6.disable_ipv6": 0} if 6 in families else {})
        netns.call_in(netns_fd, netlink.set_link_sysctls, request.ifname, sysctls)
        routes = _configure_pod(pod, request.ifname, leases)

        store.complete(attachment, now)
        undo.pop_all()
    made = Result(
        interfaces=(
            Interface(ours.name, ours.mac, "", ours.mtu),
            Interface(theirs.name, theirs.mac, request.netns, theirs.mtu),
        ),
        ips=tuple(
            Ip(f"{lease.address}/{lease.address.max_prefixlen}", str(lease.gateway), 1) for lease in leases
        ),
        routes=routes,
        dns=(request.config or {}).get("dns", {}),
    )
    return request.previous.followed_by(made) if request.previous else made


def delete(request: Request, store: Store, host: Netlink, now: float) -> None:
    """Remove the interface and release its addresses. Succeeds when there is nothing left to do.

    The link goes first: an address must not be given out again while a link still carries it.
    """
    _delete_port(request.attachment, host)
    store.release(request.attachment, now)


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
    with _opened_netns(request) as netns_fd, netns.call_in(netns_fd, Netlink) as pod:
        port = _checked_port(host, record)
        _check_pod(pod, request.ifname, port, record)


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


def _refuse_existing(attachment: Attachment, store: Store, host: Netlink, pod: Netlink) -> None:
    """A second ADD is an error; the remains of one that was killed half way are cleared away."""
    record = store.find(attachment)
    if record is not None and record.attached_at is not None:
        raise CniError(Code.ALREADY_ATTACHED, f"{_shown(attachment)} is attached already; DEL comes first")
    if record is not None:
        _delete_port(attachment, host)
        store.forget(attachment)
    if pod.find_link(attachment.ifname) is not None:
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"CNI_IFNAME {attachment.ifname} exists already in the pod's namespace"
        )
    port = host.find_link(host_ifname_of(attachment))
    if port is not None and not _is_port_of(attachment, port):
        raise CniError(Code.KERNEL_REFUSED, f"{port.name} exists and is not ours: {port.alias or port.kind}")
    if port is not None:  # left over without a record; its other end is not in this pod
        host.delete_link(port.name)


def _reserve(
    request: Request, host_ifname: str, network: NodeNetwork, store: Store, now: float
) -> tuple[Lease, ...]:
    pools = network.pools()
    if not netlink.ipv6_present():
        # A dual-stack node whose kernel has no IPv6 still serves IPv4.
        pools = tuple(pool for pool in pools if pool.low.version == 4)
    if not pools:
        raise CniError(Code.TRY_AGAIN_LATER, "this node has no prefix that its kernel could serve")
    args = request.args or {}
    pod = (args.get("K8S_POD_NAMESPACE", ""), args.get("K8S_POD_NAME", ""))
    try:
        return store.reserve(request.attachment, host_ifname, network.bridge, pools, now, pod)
    except PoolExhaustedError as error:
        raise CniError(Code.TRY_AGAIN_LATER, str(error)) from None


def _configure_pod(pod: Netlink, ifname: str, leases: Sequence[Lease]) -> tuple[Route, ...]:
    """Addresses, link up, routes; returns the default routes as the result tells them."""
    link = pod.find_link(ifname)
    if link is None:
        raise CniError(Code.KERNEL_REFUSED, f"{ifname} vanished from the pod's namespace")
    for lease in leases:
        pod.add_address(link.index, lease.address)
    pod.set_up(ifname)
    made = []
    for lease in leases:
        for route in _routes_of(lease):
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


def _routes_of(lease: Lease) -> tuple[netlink.Route, ...]:
    """The gateway on the link, then everything through it: the address alone has no neighbours."""
    to_gateway = netlink.Route(lease.gateway, lease.gateway.max_prefixlen)
    return to_gateway, netlink.Route(_ANYWHERE[lease.gateway.version], 0, lease.gateway)


def _delete_port(attachment: Attachment, host: Netlink) -> None:
    """Delete the host end, its peer with it. Another's link of that name is left alone."""
    port = host.find_link(host_ifname_of(attachment))
    if port is not None and _is_port_of(attachment, port):
        host.delete_link(port.name)


def _is_port_of(attachment: Attachment, port: Link) -> bool:
    # An ADD killed between making the link and marking it leaves no alias.
    return port.kind == "veth" and port.alias in ("", alias_of(attachment))


def _checked_port(host: Netlink, record: Record) -> Link:
    name = record.host_ifname
    port, bridge = host.find_link(name), host.find_link(record.bridge)
    if port is None:
        raise _failed(f"{name}, the host end, is missing")
    if bridge is None or port.master != bridge.index:
        raise _failed(f"{name} is not a port of {record.bridge}")
    if not port.up:
        raise _failed(f"{name}, the host end, is down")
    if not port.isolated:
        raise _failed(f"{name} is not an isolated port of {record.bridge}")
    return port


def _check_pod(pod: Netlink, ifname: str, port: Link, record: Record) -> None:
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
        for route in _routes_of(lease):
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
