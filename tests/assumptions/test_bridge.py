"""What the node's bridge does for us: isolation, the gateway, and O(1) routing of the cluster to the TAP."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from forwarder.demo.lab import link_index, netlink
from forwarder.demo.probes import Station, ping
from tests.assumptions.conftest import Namespace
from tests.assumptions.kernel import (
    GSO_NONE,
    NODAD,
    NTF_MASTER,
    NUD_NOARP,
    NUD_PERMANENT,
    VIRTIO_HEADER,
    link_address,
    open_tap,
    read_frames,
    set_up,
    udp_socket,
)
from tests.packets import build

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

GATEWAY = {4: "10.71.1.1", 6: "fd71:0:0:1::1"}
CLUSTER = {4: "10.71.0.0/16", 6: "fd71::/48"}
REMOTE = {4: "10.71.2.2", 6: "fd71:0:0:2::2"}
VIRTUAL_ROUTER = {4: "169.254.71.1", 6: "fe80::706f:646c"}
ROUTER_MAC = "02:70:6c:00:00:01"
NO_HEADER = VIRTIO_HEADER.pack(0, GSO_NONE, 0, 0, 0, 0)


@dataclass(frozen=True)
class Switch:
    namespace: Path
    tap: int
    mac: str


@pytest.fixture
def switch(namespace: Namespace) -> Iterator[Switch]:
    """A bridge with a gateway address of each family, and a TAP as an isolated port that learns nothing."""
    node = namespace()
    with netlink(node) as ip:
        ip.link("add", ifname="br", kind="bridge", br_mcast_snooping=0)
    set_up(node, "br", GATEWAY[4], 24)
    set_up(node, "br", GATEWAY[6], 64)
    tap = open_tap(node)
    try:
        add_port(node, "tap", learning=0, unicast_flood=0)
        yield Switch(node, tap, link_address(node, "br"))
    finally:
        os.close(tap)


def add_port(namespace: Path, name: str, *, isolated: bool = True, **port: int) -> None:
    with netlink(namespace) as ip:
        index = link_index(ip, name)
        ip.link("set", index=index, master=link_index(ip, "br"), state="up")
        ip.brport("set", index=index, isolated=int(isolated), **port)


def add_pod(switch: Switch, namespace: Path, number: int, *, isolated: bool = True) -> Station:
    """A namespace behind a veth port, with both families and no route but the network's."""
    with netlink(switch.namespace) as ip, namespace.open("rb") as there:
        peer = {"ifname": "eth0", "net_ns_fd": there.fileno()}
        ip.link("add", ifname=f"pod{number}", kind="veth", peer=peer)
    ips = (f"10.71.1.{number}", f"fd71:0:0:1::{number}")
    set_up(namespace, "eth0", ips[0], 24)
    set_up(namespace, "eth0", ips[1], 64)
    add_port(switch.namespace, f"pod{number}", isolated=isolated)
    return Station(f"pod{number}", namespace, ips)


def route_cluster(switch: Switch, version: int) -> None:
    """The whole of what the kernel is told: a route, a neighbour, an FDB entry."""
    with netlink(switch.namespace) as ip:
        bridge, tap = link_index(ip, "br"), link_index(ip, "tap")
        ip.neigh("add", dst=VIRTUAL_ROUTER[version], lladdr=ROUTER_MAC, ifindex=bridge, state=NUD_PERMANENT)
        ip.route("add", dst=CLUSTER[version], gateway=VIRTUAL_ROUTER[version], oif=bridge, flags=["onlink"])
        # In an FDB "permanent" would mean an address of the bridge's own; NOARP is a static entry.
        entry = {"lladdr": ROUTER_MAC, "state": NUD_NOARP, "flags": NTF_MASTER}
        ip.neigh("add", family=socket.AF_BRIDGE, ifindex=tap, **entry)


def test_isolated_ports_reach_the_bridge_and_not_each_other(switch: Switch, namespace: Namespace) -> None:
    """So pods meet only in the host's IP stack, and ARP or ND tricks die at the port."""
    one, other = (add_pod(switch, namespace(), number) for number in (2, 3))
    gateway = Station("gateway", switch.namespace, (GATEWAY[4], GATEWAY[6]))
    assert ping([(one, gateway), (other, gateway), (gateway, one), (gateway, other)]).lost == ()
    assert ping([(one, other)], seconds=0.3).received == 0


def test_ports_that_are_not_isolated_reach_each_other(switch: Switch, namespace: Namespace) -> None:
    """The test above can fail: it is the flag that keeps them apart."""
    one, other = (add_pod(switch, namespace(), number, isolated=False) for number in (2, 3))
    assert ping([(one, other)]).lost == ()


@pytest.mark.parametrize("version", [4, 6])
def test_a_cluster_route_through_the_virtual_router_ends_in_the_tap(switch: Switch, version: int) -> None:
    """`onlink` needs no address in the virtual router's network, the permanent neighbour no ARP or ND, and
    the static FDB entry picks the port though flooding is off: three objects for any number of peers. The
    source is the gateway's address, which is inside the node's own prefix."""
    route_cluster(switch, version)
    with udp_socket(switch.namespace, "0.0.0.0" if version == 4 else "::") as sender:
        sender.sendto(b"to a remote pod", (REMOTE[version], 9))
    (frame,) = (f[10:] for f in read_frames(switch.tap, 1000, 0.3) if f.endswith(b"to a remote pod"))
    assert frame[:12] == build.mac(ROUTER_MAC) + build.mac(switch.mac)
    source = frame[26:30] if version == 4 else frame[22:38]
    assert source == ip_address(GATEWAY[version]).packed


@pytest.mark.parametrize("version", [4, 6])
def test_the_nodes_own_prefix_wins_over_the_cluster_route(
    switch: Switch, namespace: Namespace, version: int
) -> None:
    """Longest prefix: local pods are found by ARP or ND on the bridge, not sent to the TAP."""
    route_cluster(switch, version)
    pod = add_pod(switch, namespace(), 2)
    gateway = Station("gateway", switch.namespace, (GATEWAY[version],))
    assert ping([(pod, gateway), (gateway, Station("pod", pod.namespace, pod.ips))]).lost == ()


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_from_the_tap_to_the_bridges_own_mac_is_taken_up(switch: Switch, version: int) -> None:
    """Decapsulated frames are addressed to the bridge's MAC, and so enter the host's IP stack."""
    with udp_socket(switch.namespace, GATEWAY[version]) as receiver:
        port = receiver.getsockname()[1]
        packet = build.udp(REMOTE[version], GATEWAY[version], b"from a remote pod", dport=port)
        route_cluster(switch, version)  # or the reverse-path filter may not like the source
        kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
        os.write(switch.tap, NO_HEADER + build.mac(switch.mac) + build.mac(ROUTER_MAC) + kind + packet)
        assert receiver.recv(100) == b"from a remote pod"


def test_a_frame_for_another_mac_leaves_by_no_port(switch: Switch, namespace: Namespace) -> None:
    """Unknown unicast is not flooded to the TAP: what is not for the virtual router does not reach it."""
    pod = add_pod(switch, namespace(), 2, isolated=False)
    with netlink(pod.namespace) as ip:
        stranger = {"dst": "10.71.1.99", "lladdr": "02:00:00:00:00:99"}
        ip.neigh("add", ifindex=link_index(ip, "eth0"), state=NUD_PERMANENT, **stranger)
    with udp_socket(pod.namespace, pod.ips[0]) as sender:
        sender.sendto(b"to a stranger", ("10.71.1.99", 9))
    assert not any(frame.endswith(b"to a stranger") for frame in read_frames(switch.tap, 1000, 0.3))


def test_nodad_addresses_are_usable_at_once(switch: Switch) -> None:
    """Without it a bind fails for a second or more, which a pod's start would wait for."""
    with netlink(switch.namespace) as ip:
        ip.addr("add", index=link_index(ip, "br"), address="fd71:0:0:1::77", prefixlen=64, **NODAD)
    udp_socket(switch.namespace, "fd71:0:0:1::77").close()
