"""The kernel's side of a node: reads what is installed, performs reconcile's operations, opens the TAP.

Netlink here is blocking and must not run on the event loop's thread once the loop runs: pyroute2 drives
a loop of its own. Errors are LinkError, a sentence that says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from socket import AF_BRIDGE, AF_INET, AF_INET6
from typing import Any, Final

import pytun
from pyroute2 import Ethtool, IPRoute
from pyroute2.ethtool.ioctl import IoctlEthtool
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from forwarder.addresses import VIRTUAL_ROUTER, Address, format_mac
from forwarder.peers import is_inside
from forwarder.reconcile import (
    ALIAS_PREFIX,
    ROUTE_PROTOCOL,
    AddAddress,
    CreateBridge,
    ForeignError,
    Interface,
    KernelState,
    Link,
    Operation,
    PutFdb,
    PutNeighbour,
    PutRoute,
    Removal,
    RemoveAddress,
    RemoveRoute,
    Route,
    SetLink,
    SetUp,
    Wiring,
    WriteSysctl,
    is_ours,
    reconcile,
    wanted,
)
from forwarder.underlay import Device, Host

SYSCTL_ROOT: Final = Path("/proc/sys")
TUN_DEVICE: Final = Path("/dev/net/tun")

ROUNDS: Final = 3
"""Times that reading and repairing is tried before giving up: removing an address can take routes with
it, which only the next reading shows."""

GONE: Final = {errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL}
"""What removing answers when another removal has taken the thing along already."""

FAMILY = {4: AF_INET, 6: AF_INET6}

DEFAULT_METRIC: Final = {4: None, 6: 1024}  # IP6_RT_PRIO_USER, linux/ipv6_route.h

# linux/neighbour.h, linux/if_addr.h, linux/rtnetlink.h
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_MASTER, NTF_STICKY = 0x04, 0x40
IFA_F_NODAD = 0x02
IFA_F_UNUSABLE = 0x08 | 0x40  # DADFAILED, TENTATIVE
IFA_F_SECOND_CHOICE = 0x01 | 0x20  # SECONDARY or TEMPORARY, DEPRECATED
RTNH_F_ONLINK = 0x04
RTAX_MTU = 2
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
IFF_NAPI = 0x10  # linux/if_tun.h, Linux 4.15; older ones ignore it
TUNSETTXFILTER = 0x400454D1  # linux/if_tun.h; takes a struct tun_filter: flags, count, MACs
IFF_UP, IFF_LOOPBACK = 0x1, 0x8


class LinkError(RuntimeError):
    """The kernel cannot be brought to the wanted state; the text says why and what to do."""


def ipv6_available() -> bool:
    """Whether this host has IPv6 and has not switched it off."""
    try:
        return (SYSCTL_ROOT / "net/ipv6/conf/all/disable_ipv6").read_text().strip() == "0"
    except OSError:
        return False


def bridge_netfilter() -> bool:
    """Whether br_netfilter is loaded, and can be set for this namespace."""
    return (SYSCTL_ROOT / "net/bridge").is_dir()


def open_tap(name: str, node_id: str, router_mac: bytes) -> Any:
    """The node's TAP, as `open_device`. It reads as frames to the router MAC."""
    tap = open_device(name, node_id, IFF_NAPI)
    try:
        _merge_nothing(name)
        # The host's own multicast and ARP are flooded to every port whatever its flags say; without
        # this each would wake the pump only to be dropped.
        fcntl.ioctl(tap.fileno(), TUNSETTXFILTER, struct.pack("=HH6s", 0, 1, router_mac))
    except BaseException:
        tap.close()
        raise
    return tap


def _merge_nothing(name: str) -> None:
    """Switch off GRO, which comes with NAPI. What may be merged the pump has merged."""
    device = IoctlEthtool(name)
    try:
        features = device.get_features()
        features.set_value("rx-gro", False)
        device.set_features(features)
    finally:
        device.close()


def open_device(name: str, node_id: str, extra_flags: int = 0) -> Any:
    """The pytun device of a TAP with our mark on it, non-blocking, gone when it is closed; each frame is
    behind a virtio_net_hdr (IFF_VNET_HDR)."""
    with _netlink() as netlink:
        current = _link(netlink, name)
        if current is not None and not (current.kind == "tun" and is_ours(current)):
            raise LinkError(
                f"link {name} was not made by podloom: remove it or choose another name in [links]"
            )
        try:
            tap = pytun.TunTapDevice(
                name=name, flags=pytun.IFF_TAP | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR | extra_flags
            )
        except (OSError, pytun.Error) as error:
            raise LinkError(_tap_failure(name, error)) from error
        try:
            os.set_blocking(tap.fileno(), False)
            os.set_inheritable(tap.fileno(), False)
            netlink.link("set", index=_index(netlink, name), ifalias=ALIAS_PREFIX + node_id)
        except BaseException:
            tap.close()
            raise
    return tap


def add_address(name: str, address: Address) -> None:
    """Give a link an address of its own, with no network behind it. It goes with the link."""
    with _netlink() as netlink:
        netlink.addr(
            "add",
            index=_index(netlink, name),
            family=FAMILY[address.version],
            address=str(address),
            prefixlen=address.max_prefixlen,
            scope=RT_SCOPE_LINK,
        )


def route_to(name: str, address: Address, mac: bytes) -> None:
    """Lead one address to a link and a MAC there. Both entries go with the link."""
    with _netlink() as netlink:
        index, family = _index(netlink, name), FAMILY[address.version]
        netlink.route("replace", family=family, dst=f"{address}/{address.max_prefixlen}", oif=index)
        netlink.neigh(
            "replace",
            family=family,
            dst=str(address),
            lladdr=format_mac(mac),
            ifindex=index,
            state=NUD_PERMANENT,
        )


def segments_tunnels(endpoint: Address) -> bool:
    """Whether the device that has the address cuts tunnel superframes itself (ethtool's
    tx-udp_tnl-csum-segmentation)."""
    with _netlink() as netlink:
        name = _device_of(netlink, endpoint).get("IFLA_IFNAME")
    ethtool = Ethtool()
    try:
        features = ethtool.get_features(name).features
        return bool(features["tx-udp_tnl-csum-segmentation"].enable)
    except (KeyError, NetlinkError, OSError):
        return False
    finally:
        ethtool.close()


def _tap_failure(name: str, error: Exception) -> str:
    code = error.args[0] if error.args else None
    if code == errno.EBUSY:
        return (
            f"TAP {name} is held by another process: stop the other podloom or choose another name in [links]"
        )
    if code == errno.EPERM:
        return f"opening TAP {name} needs CAP_NET_ADMIN: run as root"
    if not TUN_DEVICE.exists():
        return f"{TUN_DEVICE} is missing: load the tun module, or hand the device into this container"
    reason = error.args[-1] if error.args else error
    return f"cannot open TAP {name} through {TUN_DEVICE}: {reason}"


def has_tap(name: str) -> bool:
    """Whether the TAP that we opened under this name is still there."""
    with _netlink() as netlink:
        link = _link(netlink, name)
        return link is not None and link.kind == "tun" and is_ours(link)


def observe(*, routes: bool) -> Host:
    """What of this host decides where the node is on the underlay; default routes only if wanted."""
    with _netlink() as netlink:
        for _ in range(ROUNDS):
            try:
                return Host(tuple(_devices(netlink)), dict(_default_routes(netlink)) if routes else {})
            except NetlinkDumpInterrupted:
                continue
    raise LinkError("the kernel's tables change too fast to be read")


def _devices(netlink: Any) -> Iterator[Device]:
    found: dict[int, list[tuple[bool, Address]]] = {}
    for message in netlink.get_addr():
        flags = message.get("IFA_FLAGS") or message["flags"]
        if message["scope"] == RT_SCOPE_UNIVERSE and not flags & IFA_F_UNUSABLE:
            address = ip_address(message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"))
            found.setdefault(message["index"], []).append((bool(flags & IFA_F_SECOND_CHOICE), address))
    for index, addresses in found.items():
        try:
            (link,) = netlink.get_links(index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
            continue  # It has gone meanwhile, which makes an event of its own.
        yield Device(
            name=link.get("IFLA_IFNAME"),
            mtu_bytes=link.get("IFLA_MTU"),
            loopback=bool(link["flags"] & IFF_LOOPBACK),
            addresses=tuple(address for _, address in sorted(addresses, key=lambda item: item[0])),
        )


def _default_routes(netlink: Any) -> Iterator[tuple[int, str]]:
    for version, family in FAMILY.items():
        routes = [
            message
            for message in netlink.get_routes(family=family, table=RT_TABLE_MAIN)
            if message["dst_len"] == 0 and message["type"] == RTN_UNICAST and message.get("RTA_OIF")
        ]
        for message in sorted(routes, key=lambda message: message.get("RTA_PRIORITY") or 0)[:1]:
            (link,) = netlink.get_links(message.get("RTA_OIF"))
            yield version, link.get("IFLA_IFNAME")


def filters_strictly(link: str) -> bool:
    """Whether IPv4 packets must come by the link that leads back to their source (rp_filter)."""
    values = [(SYSCTL_ROOT / f"net/ipv4/conf/{name}/rp_filter").read_text() for name in ("all", link)]
    return max(map(int, values)) == 1


def _device_of(netlink: Any, endpoint: Address) -> Any:
    for message in netlink.get_addr(family=FAMILY[endpoint.version]):
        if ip_address(message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")) == endpoint:
            return netlink.get_links(message["index"])[0]
    raise LinkError(f"no device of this host has the address {endpoint}: correct node.endpoints or add it")


def ensure(wiring: Wiring, routes: frozenset[Route] | None = None) -> list[Operation]:
    """Bring the kernel to the wanted state, with these routes instead of the cluster's alone; what had to be
    done. The TAP must be open already."""
    target = wanted(wiring)
    if routes is not None:
        target = replace(target, routes=routes)
    done: list[Operation] = []
    with _netlink() as netlink:
        for _ in range(ROUNDS):
            operations = reconcile(target, read(netlink, wiring))
            if not operations:
                return done
            _perform_all(netlink, operations)
            done += operations
    raise LinkError(f"the kernel does not keep what is set, something undoes it: {done[-1]}")


def own_routes(wiring: Wiring) -> frozenset[Route]:
    """The main table's that carry our mark and are this node's: on its bridge, or for what is inside its
    cluster's networks."""
    with _netlink() as netlink:
        names = {message["index"]: message.get("IFLA_IFNAME") for message in netlink.get_links()}
        return frozenset(
            route
            for route in _routes(netlink, names)
            if route.protocol == ROUTE_PROTOCOL
            and (
                route.link == wiring.bridge
                or any(is_inside(route.destination, cidr) for cidr in wiring.cluster_cidrs)
            )
        )


def change_routes(
    operations: Iterable[PutRoute | RemoveRoute], installed: Collection[Route] | None = None
) -> None:
    """Perform these without reading first; what is refused does not keep the others from being done. Where
    `installed` is given it is all that is ours, and no other route is replaced."""
    faults = []
    ours = None if installed is None else {route.key for route in installed}
    with _netlink() as netlink:
        for operation in operations:
            try:
                if isinstance(operation, PutRoute) and ours is not None and operation.route.key not in ours:
                    _add_route(netlink, operation.route)
                else:
                    _perform_all(netlink, [operation])
            except LinkError as error:
                faults.append(str(error))
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise LinkError(faults[0] + more)


def _add_route(netlink: Any, route: Route) -> None:
    try:
        netlink.route("add", **_route(netlink, route), **_metrics(route))
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            raise LinkError(
                f"a route {route.destination} was not made by podloom: remove it or change cluster.cidrs"
            ) from None
        raise LinkError(f"cannot set route {route.destination}: {os.strerror(error.code)}") from error


def remove(wiring: Wiring) -> None:
    """Take our bridge away, and with it its addresses, routes and neighbours. Others' is left alone."""
    change_routes(RemoveRoute(route) for route in own_routes(wiring) if route.link != wiring.bridge)
    with _netlink() as netlink:
        link = _link(netlink, wiring.bridge)
        if link is not None and is_ours(link):
            netlink.link("del", index=_index(netlink, wiring.bridge))


@contextmanager
def _netlink() -> Iterator[Any]:
    """A netlink socket of its own for each use: pyroute2's belong to the thread that made them."""
    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        hint = ": run as root" if error.code == errno.EPERM else ""
        raise LinkError(f"the kernel refused a netlink request: {os.strerror(error.code)}{hint}") from error
    except ForeignError as error:
        raise LinkError(str(error)) from error


def read(netlink: Any, wiring: Wiring) -> KernelState:
    """What is installed of what `wanted` speaks about."""
    for _ in range(ROUNDS):
        try:
            return _read_once(netlink, wiring)
        except NetlinkDumpInterrupted:
            continue  # The table changed while it was dumped.
    raise LinkError("the kernel's tables change too fast to be read")


def _read_once(netlink: Any, wiring: Wiring) -> KernelState:
    target = wanted(wiring)
    names = {message["index"]: message.get("IFLA_IFNAME") for message in netlink.get_links()}
    links = {name: link for name in target.links if (link := _link(netlink, name)) is not None}
    return KernelState(
        links=links,
        addresses={name: _addresses(netlink, name) for name in target.addresses if name in links},
        neighbours={name: _neighbours(netlink, name) for name in target.neighbours if name in links},
        fdb={name: _fdb(netlink, name) for name in target.fdb if name in links},
        routes=frozenset(_routes(netlink, names)),
        sysctls=dict(_sysctls(target)),
    )


def _index(netlink: Any, name: str) -> int:
    found = netlink.link_lookup(ifname=name)
    if not found:
        raise LinkError(f"link {name} is gone")
    return int(found[0])


def _link(netlink: Any, name: str) -> Link | None:
    found = netlink.link_lookup(ifname=name)
    if not found:
        return None
    (message,) = netlink.get_links(found[0])
    info = message.get("IFLA_LINKINFO")
    master = message.get("IFLA_MASTER")
    return Link(
        kind=(info.get("IFLA_INFO_KIND") if info else None) or "",
        alias=message.get("IFLA_IFALIAS") or "",
        mac=message.get("IFLA_ADDRESS"),
        mtu_bytes=message.get("IFLA_MTU"),
        queue_frames=message.get("IFLA_TXQLEN"),
        up=bool(message["flags"] & IFF_UP),
        master=netlink.get_links(master)[0].get("IFLA_IFNAME") if master else None,
        settings=_attributes(info, "IFLA_INFO_DATA", "IFLA_BR_", "br_"),
        port=_attributes(info, "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_", ""),
    )


def _attributes(info: Any, nest: str, prefix: str, renamed: str) -> dict[str, int]:
    """The integers of a nest, under the names that pyroute2's requests use."""
    data = info.get(nest) if info else None
    if not data:
        return {}
    return {
        renamed + name.removeprefix(prefix).lower(): value
        for name, value in data["attrs"]
        if name.startswith(prefix) and isinstance(value, int)
    }


def _addresses(netlink: Any, name: str) -> frozenset[Interface]:
    return frozenset(
        ip_interface((message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"), message["prefixlen"]))
        for message in netlink.get_addr(index=_index(netlink, name))
        if message["scope"] == RT_SCOPE_UNIVERSE
    )


def _neighbours(netlink: Any, name: str) -> dict[Address, str]:
    index = _index(netlink, name)
    found = {}
    for version, family in FAMILY.items():
        for message in netlink.get_neighbours(family=family, ifindex=index):
            address = ip_address(message.get("NDA_DST"))
            if address == VIRTUAL_ROUTER[version] and message["state"] & NUD_PERMANENT:
                found[address] = message.get("NDA_LLADDR")
    return found


def _fdb(netlink: Any, name: str) -> frozenset[str]:
    index = _index(netlink, name)
    return frozenset(
        message.get("NDA_LLADDR")
        for message in netlink.fdb("dump")
        if message["ifindex"] == index
        and message.get("NDA_MASTER")
        and message["state"] & NUD_NOARP
        and message["flags"] & NTF_STICKY
    )


def _routes(netlink: Any, names: dict[int, str]) -> Iterator[Route]:
    for version, family in FAMILY.items():
        for message in netlink.get_routes(family=family, table=RT_TABLE_MAIN):
            gateway, source = message.get("RTA_GATEWAY"), message.get("RTA_PREFSRC")
            via, metrics = message.get("RTA_VIA"), message.get("RTA_METRICS")
            metric = message.get("RTA_PRIORITY")
            destination = message.get("RTA_DST") or ("0.0.0.0" if version == 4 else "::")
            yield Route(
                destination=ip_network((destination, message["dst_len"])),
                link=names.get(message.get("RTA_OIF")),
                gateway=ip_address(gateway or via["addr"]) if gateway or via else None,
                source=ip_address(source) if source else None,
                onlink=bool(message["flags"] & RTNH_F_ONLINK),
                protocol=message["proto"],
                mtu_bytes=(metrics.get("RTAX_MTU") if metrics else None) or None,
                metric=metric if metric != DEFAULT_METRIC[version] else None,
            )


def _sysctls(target: KernelState) -> Iterator[tuple[str, str]]:
    for path in target.sysctls:
        try:
            yield path, (SYSCTL_ROOT / path).read_text().strip()
        except OSError:
            continue  # Of a link that is not there yet, or of a kernel that lacks it: writing will tell.


def _perform_all(netlink: Any, operations: Iterable[Operation]) -> None:
    for operation in operations:
        try:
            _perform(netlink, operation)
        except NetlinkError as error:
            if not (isinstance(operation, Removal) and error.code in GONE):
                raise LinkError(f"cannot {operation}: {os.strerror(error.code)}") from error
        except OSError as error:  # A sysctl of a host or container that lets nobody write it.
            raise LinkError(f"cannot {operation}: {error.strerror}; set it on the host") from error


def _perform(netlink: Any, operation: Operation) -> None:
    match operation:
        case CreateBridge(name, link):
            netlink.link("add", ifname=name, kind="bridge", address=link.mac, **link.settings)
        case SetLink(name, link, current):
            _set_link(netlink, name, link, current)
        case SetUp(name):
            netlink.link("set", index=_index(netlink, name), state="up")
        case WriteSysctl(path, value):
            (SYSCTL_ROOT / path).write_text(value)
        case RemoveAddress(name, address):
            netlink.addr("del", index=_index(netlink, name), **_address(address))
        case AddAddress(name, address):
            netlink.addr("add", index=_index(netlink, name), flags=IFA_F_NODAD, **_address(address))
        case PutNeighbour(name, address, mac):
            index = _index(netlink, name)
            family = FAMILY[address.version]
            netlink.neigh(
                "replace", family=family, dst=str(address), lladdr=mac, ifindex=index, state=NUD_PERMANENT
            )
        case PutFdb(name, mac):
            # Sticky: a pod that sends with the router's MAC must not draw the entry to its own port.
            netlink.neigh(
                "replace",
                family=AF_BRIDGE,
                lladdr=mac,
                ifindex=_index(netlink, name),
                state=NUD_NOARP,
                flags=NTF_MASTER | NTF_STICKY,
            )
        case RemoveRoute(route):
            netlink.route("del", **(_route(netlink, route) | {"scope": RT_SCOPE_NOWHERE}))
        case PutRoute(route):
            netlink.route("replace", **_route(netlink, route), **_metrics(route))


def _set_link(netlink: Any, name: str, link: Link, current: Link | None) -> None:
    index = _index(netlink, name)
    if link.master is not None and (current is None or current.master != link.master):
        netlink.link("set", index=index, master=_index(netlink, link.master))
    if link.port:
        netlink.brport("set", index=index, **link.port)
    for setting, value in link.settings.items():
        # One at a time: what one allows depends on the one before.
        if current is None or current.settings.get(setting) != value:
            netlink.link("set", index=index, kind=link.kind, **{setting: value})
    values = {"ifalias": link.alias, "mtu": link.mtu_bytes, "address": link.mac, "txqlen": link.queue_frames}
    netlink.link("set", index=index, **{key: value for key, value in values.items() if value is not None})


def _address(address: Interface) -> dict[str, Any]:
    return {
        "family": FAMILY[address.version],
        "address": str(address.ip),
        "prefixlen": address.network.prefixlen,
    }


def _route(netlink: Any, route: Route) -> dict[str, Any]:
    request = {
        "family": FAMILY[route.destination.version],
        "dst": str(route.destination),
        "oif": _index(netlink, route.link or ""),
        "proto": ROUTE_PROTOCOL,
        "flags": RTNH_F_ONLINK if route.onlink else 0,
        "table": RT_TABLE_MAIN,
    }
    if route.metric is not None:
        request["priority"] = route.metric
    if route.gateway is not None and route.gateway.version == route.destination.version:
        request["gateway"] = str(route.gateway)
    elif route.gateway is not None:
        request["via"] = {"family": FAMILY[route.gateway.version], "addr": str(route.gateway)}
    if route.source is not None:
        request["prefsrc"] = str(route.source)
    return request


def _metrics(route: Route) -> dict[str, Any]:
    """A removal may not name them: IPv4 routes would have to match."""
    if route.mtu_bytes is None:
        return {}
    metrics = {"mtu": route.mtu_bytes}
    if route.destination.version == 6:
        # Only a locked MTU holds for what is forwarded (ip6_dst_mtu_maybe_forward, net/ip6_route.h).
        metrics["lock"] = 1 << RTAX_MTU
    return {"metrics": metrics}
