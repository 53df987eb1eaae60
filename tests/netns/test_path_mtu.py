"""A path that shrinks under running traffic: pods are told, TCP goes on, and it ends when the path grows."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import Node, until
from tests.netns.pods import require_nft
from tests.netns.transfer import Transfer, in_namespace
from tests.netns_tools import Namespace, run

pytestmark = pytest.mark.root

SHORT = 1400
"""What the path carries when it is short, outer IP header included."""

UNDERLAY = {4: "192.0.{}.{}", 6: "2001:db8:{}::{}"}
INSIDE = {4: "10.42.{}.{}", 6: "fd42:0:0:{}::{}"}
BITS = {4: 32, 6: 128}
OVERHEAD = {4: 50, 6: 70}

# linux/in.h; the socket module lacks them.
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0


@dataclass
class Network:
    """Two nodes on networks of their own, a router between, and a pod behind each node."""

    nodes: tuple[Node, Node]
    pods: tuple[Namespace, Namespace]
    router: Namespace

    def start(self, underlay: int, *, features: Sequence[str] = (), **offload: Any) -> None:
        for node, other in (self.nodes, self.nodes[::-1]):
            node.tables["node"]["endpoints"] = [UNDERLAY[underlay].format(node.number, node.number)]
            other.tables["node"]["endpoints"] = [UNDERLAY[underlay].format(other.number, other.number)]
            node.tables["offload"] = offload
            node.write_peers(other.record(features=features))
        for node, pod in zip(self.nodes, self.pods, strict=True):
            node.start()
            plug(node, pod)

    def set_mtu(self, place: str, mtu_bytes: int) -> None:
        """Change what the path from the first node to the second carries."""
        one, _ = self.nodes
        namespace, device = {"router": (self.router, "wire2"), "device": (one.namespace, "eth0")}[place]
        namespace.ip("link", "set", device, "mtu", str(mtu_bytes))


def wire(node: Node, router: Namespace) -> None:
    """The node's own network, on which the router is host 254."""
    here = ["eth0", "netns", node.namespace.name]
    there = [f"wire{node.number}", "netns", router.name]
    run(["ip", "link", "add", *here, "type", "veth", "peer", "name", *there])
    node.namespace.ip("link", "set", "eth0", "up")
    router.ip("link", "set", f"wire{node.number}", "up")
    for version, bits in ((4, 24), (6, 64)):
        address, gateway = (UNDERLAY[version].format(node.number, host) for host in (node.number, 254))
        dad = ["nodad"] if version == 6 else []
        node.namespace.ip("addr", "add", f"{address}/{bits}", "dev", "eth0", *dad)
        router.ip("addr", "add", f"{gateway}/{bits}", "dev", f"wire{node.number}", *dad)
        node.namespace.ip("route", "add", "default", "via", gateway)


def plug(node: Node, pod: Namespace) -> None:
    """Pod 10 of the node, wired as the CNI plugin does: routed, on an isolated port."""
    mtu = str(node.ask("status")["mtu"])
    port = ["pod10", "netns", node.namespace.name, "mtu", mtu]
    run(["ip", "link", "add", *port, "type", "veth", "peer", "name", "eth0", "netns", pod.name, "mtu", mtu])
    node.namespace.ip("link", "set", "pod10", "master", "loom0", "up")
    run(["bridge", "-n", node.namespace.name, "link", "set", "dev", "pod10", "isolated", "on"])
    pod.ip("link", "set", "eth0", "up")
    pod.set_sysctl("net/ipv6/conf/eth0/accept_redirects", "0")
    for version, bits in BITS.items():
        address, gateway = (INSIDE[version].format(node.number, host) for host in (10, 1))
        pod.ip("addr", "add", f"{address}/{bits}", "dev", "eth0", *(["nodad"] if version == 6 else []))
        pod.ip("route", "add", gateway, "dev", "eth0")
        pod.ip("route", "add", "default", "via", gateway, "dev", "eth0")


@pytest.fixture
def network(tun: None, netns: Callable[[], Namespace], tmp_path: Path) -> Iterator[Network]:
    with ExitStack() as undo:
        nodes = Node(1, netns(), tmp_path / "n1"), Node(2, netns(), tmp_path / "n2")
        network = Network(nodes, (netns(), netns()), netns())
        for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            network.router.set_sysctl(name, "1")
        for node in nodes:
            undo.callback(node.clean_up)
            wire(node, network.router)
        yield network


def pod_mtu(network: Network, inside: int) -> int | None:
    """What the first pod was told of the way to the second."""
    return told_mtu(network.pods[0], INSIDE[inside].format(2, 10))


def told_mtu(namespace: Namespace, destination: str) -> int | None:
    (route,) = namespace.ip_json("route", "get", destination)
    mtu_bytes: int | None = (route.get("metrics") or [{}])[0].get("mtu")
    return mtu_bytes


def path_mtu(node: Node) -> int | None:
    (peer,) = node.ask("peers")
    mtu_bytes: int | None = peer["path_mtu"]
    return mtu_bytes


def path_routes(node: Node) -> dict[str, int]:
    """MTU by destination of our routes that have one."""
    shown = [
        *node.namespace.ip_json("route", "show", "proto", "71"),
        *node.namespace.ip_json("-6", "route", "show", "proto", "71"),
    ]
    return {route["dst"]: route["metrics"][0]["mtu"] for route in shown if route.get("metrics")}


def forget_learned(node: Node, underlay: int) -> None:
    """As time does: what the kernel learned of paths expires after minutes."""
    node.namespace.ip(f"-{underlay}", "route", "flush", "cache")


@pytest.mark.parametrize("uplink", [pytest.param("off", marks=pytest.mark.slow), "on"])
@pytest.mark.parametrize("inside", [4, 6], ids=["IPv4 inside", "IPv6 inside"])
@pytest.mark.parametrize("underlay", [4, 6], ids=["IPv4 wire", "IPv6 wire"])
@pytest.mark.parametrize("place", ["router", "device"])
def test_tcp_goes_on_over_a_path_that_shrinks(
    network: Network, place: str, underlay: int, inside: int, uplink: str
) -> None:
    network.start(underlay, uplink=uplink)
    one, _ = network.nodes
    assert one.ask("status")["offloads"]["uplink"]["on"] == (uplink == "on")
    prefixes = one.ask("peers")[0]["prefixes"]
    here, there = (pod.path for pod in network.pods)
    with Transfer(here, there, INSIDE[inside].format(2, 10)) as transfer:
        transfer.goes_on()
        assert (path_mtu(one), path_routes(one), pod_mtu(network, inside)) == (None, {}, None)
        network.set_mtu(place, SHORT)
        until(lambda: one.ask("peers")[0]["mtu"] == SHORT - OVERHEAD[underlay], "the peer's MTU")
        until(lambda: pod_mtu(network, inside) == SHORT - OVERHEAD[underlay], "ICMP to the pod")
        if place == "router":
            assert path_mtu(one) == SHORT
            assert path_routes(one) == dict.fromkeys(prefixes, SHORT - OVERHEAD[underlay])
            assert str(SHORT) in one.run("peers").stdout
        else:  # All paths have it, and so has the node.
            until(lambda: one.ask("status")["mtu"] == SHORT - OVERHEAD[underlay], "the node's MTU")
            until(lambda: path_routes(one) == {}, "no routes for single peers")
        transfer.goes_on()

        network.set_mtu(place, 1500)
        forget_learned(one, underlay)
        until(lambda: one.ask("peers")[0]["mtu"] == 1500 - OVERHEAD[underlay], "the peer's MTU's growth")
        until(lambda: (path_mtu(one), path_routes(one)) == (None, {}), "the routes' end")
        transfer.goes_on()


BLACK_HOLE = """
table ip hole {{
  chain forward {{
    type filter hook forward priority 0;
    meta length > {} drop
  }}
}}
"""


@pytest.mark.slow
def test_tcp_goes_on_over_a_path_that_drops_silently(network: Network) -> None:
    """Nobody says "too big": padded probes find out what passes, and that it all passes again."""
    require_nft()
    # Datagrams lie on the wire as the path sees them, and not as superframes.
    network.start(4, features=["health"], uplink="off", udp_segment=False)
    one, two = network.nodes
    here, there = (pod.path for pod in network.pods)
    with Transfer(here, there, INSIDE[4].format(2, 10)) as transfer:
        transfer.goes_on()
        run(network.router.command(["nft", "-f", "-"]), input=BLACK_HOLE.format(SHORT))
        until(lambda: path_mtu(one) == path_mtu(two) == SHORT, "the path MTU", 30)
        until(lambda: pod_mtu(network, 4) == SHORT - OVERHEAD[4], "ICMP to the pod")
        transfer.goes_on()
        assert one.ask("peers")[0]["health"]["state"] == "up"
        run(network.router.command(["nft", "delete", "table", "ip", "hole"]))
        until(lambda: path_mtu(one) is path_mtu(two) is None, "the path MTU's growth", 15)
        until(lambda: path_routes(one) == {}, "the routes' end")
        transfer.goes_on()


def shrink(network: Network, mtu_bytes: int = SHORT) -> None:
    """Have the first node find out that the path carries less, by a packet that is too long for it."""
    one, _ = network.nodes
    network.set_mtu("router", mtu_bytes)
    with udp(network, 4) as sender:
        sender.send(bytes(1400))
        until(lambda: path_mtu(one) == mtu_bytes, "the path MTU")


def udp(network: Network, inside: int) -> socket.socket:
    """A socket in the first pod for packets to the second."""
    family = socket.AF_INET if inside == 4 else socket.AF_INET6

    def connect() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.connect((INSIDE[inside].format(2, 10), 5001))
        return sock

    sock: socket.socket = in_namespace(network.pods[0].path, connect)
    return sock


def test_packets_that_may_be_fragmented_are(network: Network) -> None:
    network.start(4)
    one, _ = network.nodes
    shrink(network)
    until(lambda: path_routes(one).get("10.42.2.0/24") == 1350, "the route")

    def receiver() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((INSIDE[4].format(2, 10), 5001))
        sock.settimeout(5)
        return sock

    with in_namespace(network.pods[1].path, receiver) as arriving, udp(network, 4) as sender:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        payload = os.urandom(1422)  # 1450 with its headers
        sender.send(payload)
        assert arriving.recv(2000) == payload


def test_ipv6_is_told_nothing_below_its_minimum(network: Network) -> None:
    network.start(4)
    one, _ = network.nodes
    shrink(network, 1300)
    until(lambda: path_routes(one) == {"10.42.2.0/24": 1250}, "the route")
    assert one.log.count("IPv6 needs an MTU of 1280, and less is left to n2") == 1
    dropped = one.ask("drops")["encap"]["too_big"]
    with udp(network, 6) as sender:
        sender.send(bytes(1300))
        until(lambda: one.ask("drops")["encap"]["too_big"] == dropped + 1, "the drop")
    assert pod_mtu(network, 6) is None


def test_routes_go_with_the_peer(network: Network) -> None:
    network.start(4)
    one, _ = network.nodes
    shrink(network)
    until(lambda: len(path_routes(one)) == 2, "the routes")
    one.write_peers("")
    until(lambda: path_routes(one) == {}, "the routes' end")


def test_a_restart_finds_what_was_left(network: Network) -> None:
    network.start(4)
    one, _ = network.nodes
    shrink(network)
    until(lambda: len(path_routes(one)) == 2, "the routes")
    one.stop(signal.SIGKILL)
    network.set_mtu("router", 1500)
    forget_learned(one, 4)
    assert len(path_routes(one)) == 2
    one.start()
    assert (path_routes(one), path_mtu(one)) == ({}, None)
