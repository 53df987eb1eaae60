"""Pods of nodes on one segment talk without a tunnel, and by it as soon as the segment does not take them."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forwarder.demo.probes import Station, ping, transfer
from tests.netns.nodes import Node, until
from tests.netns.pods import in_namespace, plug, require_nft, source_seen
from tests.netns_tools import Namespace, run

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

PAYLOAD = bytes(range(256)) * (1 << 14)
FALL_SECONDS = 3.0
UNDERLAY = {4: "192.0.2.{}", 6: "2001:db8::{}"}
ALL = {4, 6}


@dataclass(frozen=True)
class Pod(Station):
    home: Namespace


@dataclass
class Segment:
    """Nodes whose links are ports of one bridge, which counts datagrams of tunnels and can be told not to
    take pods' packets."""

    wire: Namespace
    nodes: tuple[Node, ...]

    def start(self, underlay: tuple[int, ...] = (4, 6), features: tuple[str, ...] = ("direct",)) -> None:
        for node in self.nodes:
            node.tables["node"]["endpoints"] = [UNDERLAY[version].format(node.number) for version in underlay]
            node.tables["underlay"] = {"direct": "auto"}
        for node in self.nodes:
            others = [other for other in self.nodes if other is not node]
            node.write_peers("".join(other.record(features=list(features)) for other in others))
            node.start()

    def count_tunnels(self) -> None:
        """From now on."""
        self._nft(
            "table bridge wire {",
            "  counter tunnels { }",
            "  chain forward {",
            "    type filter hook forward priority 0;",
            "    udp dport { 6081, 4789 } counter name tunnels",
            "    jump pods",
            "  }",
            "  chain pods { }",
            "}",
        )

    def tunnelled(self) -> int:
        """Datagrams of tunnels that crossed the bridge."""
        shown = run(self.wire.command(["nft", "list", "counter", "bridge", "wire", "tunnels"]))
        return int(shown.partition("packets ")[2].split()[0])

    def refuse_pods(self, *sources: str) -> None:
        """As a network does that knows only nodes' addresses."""
        for source in sources or ("10.42.0.0/16", "fd42::/48"):
            family = "ip6" if ":" in source else "ip"
            self._nft(f"add rule bridge wire pods {family} saddr {source} drop")

    def take_pods(self) -> None:
        self._nft("flush chain bridge wire pods")

    def _nft(self, *lines: str) -> None:
        run(self.wire.command(["nft", "-f", "-"]), input="\n".join(lines) + "\n")


@pytest.fixture
def segment(netns: Callable[[], Namespace], tmp_path: Path) -> Iterator[Segment]:
    require_nft()
    with ExitStack() as undo:
        wire = netns()
        wire.ip("link", "add", "wire", "type", "bridge", "mcast_snooping", "0")
        wire.ip("link", "set", "wire", "up")
        nodes = Node(1, netns(), tmp_path / "n1"), Node(2, netns(), tmp_path / "n2")
        for node in nodes:
            undo.callback(node.clean_up)
            attach(node, wire)
        segment = Segment(wire, nodes)
        segment.count_tunnels()
        yield segment


def attach(node: Node, wire: Namespace) -> None:
    port = f"port{node.number}"
    peer = ["peer", "name", "eth0", "netns", node.namespace.name]
    run(["ip", "link", "add", port, "netns", wire.name, "type", "veth", *peer])
    wire.ip("link", "set", port, "master", "wire", "up")
    node.namespace.ip("link", "set", "eth0", "up")
    for version, bits in ((4, "24"), (6, "64")):
        nodad = ["nodad"] if version == 6 else []
        node.namespace.ip(
            "addr", "add", f"{UNDERLAY[version].format(node.number)}/{bits}", "dev", "eth0", *nodad
        )


def add_pods(nodes: Iterable[Node], netns: Callable[[], Namespace]) -> list[Pod]:
    pods = [(node, netns()) for node in nodes]
    return [
        Pod(f"pod of n{node.number}", pod.path, tuple(plug(node, pod).values()), pod) for node, pod in pods
    ]


def paths(node: Node) -> dict[int, str]:
    """How the first peer's prefixes are reached, by IP version."""
    peer = node.ask("peers")[0]
    return {6 if ":" in prefix else 4: way["path"] for prefix, way in peer["paths"].items()}


def why(node: Node) -> Any:
    return node.ask("peers")[0]["why"]


def all_by(segment: Segment, path: str, versions: set[int] = ALL) -> bool:
    return all(paths(node) | dict.fromkeys(versions, path) == paths(node) for node in segment.nodes)


def hashed(pods: list[Pod]) -> None:
    """TCP both ways in every family, and what arrives is what was sent."""
    for source, destination in (pods, pods[::-1]):
        for address in destination.ips:
            result = transfer(source, destination, address, PAYLOAD)
            assert result.hash_ok, result


def test_pods_talk_without_a_tunnel(segment: Segment, netns: Callable[[], Namespace]) -> None:
    segment.start()
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    before = segment.tunnelled()
    hashed(pods)
    assert segment.tunnelled() == before
    for address, own in zip(pods[1].ips, pods[0].ips, strict=True):
        assert source_seen(pods[1].home, address, pods[0].home) == own
    assert why(segment.nodes[0]) == "on-link by eth0"
    assert "direct: on-link by eth0" in segment.nodes[0].run("peers").stdout


class Traffic:
    """Hashed TCP from one pod to another, one transfer after the other, until the end of the `with`."""

    def __init__(self, source: Pod, destination: Pod) -> None:
        self._pair = source, destination
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failures: list[Any] = []
        self.count = 0

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        assert self._failures == []

    def _run(self) -> None:
        source, destination = self._pair
        while not self._ending.is_set():
            result = transfer(source, destination, destination.ips[self.count % 2], PAYLOAD)
            self.count += 1
            if not result.hash_ok:
                self._failures.append(result)


def seconds_until_answered(pods: list[Pod]) -> float:
    began = time.monotonic()
    while ping([(pods[0], pods[1])], 0.1).lost:
        assert time.monotonic() < began + FALL_SECONDS
    return time.monotonic() - began


def test_it_falls_to_the_tunnel_under_traffic_and_heals(
    segment: Segment, netns: Callable[[], Namespace]
) -> None:
    segment.start()
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    with Traffic(*pods):
        segment.refuse_pods()
        assert seconds_until_answered(pods) < FALL_SECONDS
        until(lambda: all_by(segment, "tunnel"), "the peer")
        until(lambda: "nothing is heard" in why(segment.nodes[0]), "the reason")
        before = segment.tunnelled()
        until(lambda: segment.tunnelled() > before, "the tunnel")
        segment.take_pods()
        until(lambda: all_by(segment, "direct"), "the way back", 15)
    before = segment.tunnelled()
    hashed(pods)
    assert segment.tunnelled() == before


@pytest.mark.slow
def test_one_way_is_no_way(segment: Segment, netns: Callable[[], Namespace]) -> None:
    """Both leave it, and the node that still hears says that it is not heard."""
    segment.start()
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    segment.refuse_pods("10.42.1.0/24")
    until(lambda: all_by(segment, "tunnel", {4}), "the tunnel", FALL_SECONDS)
    assert paths(segment.nodes[0])[6] == "direct"
    until(lambda: "it does not hear us" in why(segment.nodes[0]), "the reason")
    until(lambda: "nothing is heard" in why(segment.nodes[1]), "the other reason")
    hashed(pods)


@pytest.mark.slow
def test_a_restart_keeps_the_way_and_a_removal_takes_it_along(segment: Segment) -> None:
    one, two = segment.nodes
    segment.start()
    until(lambda: all_by(segment, "direct"), "the direct path")
    assert one.stop(signal.SIGKILL) == -signal.SIGKILL
    assert direct_routes(one) == {"10.42.2.0/24", "fd42:0:0:2::/64"}
    one.tables["links"] = {"keep_on_exit": False}
    one.start()
    until(lambda: all_by(segment, "direct"), "the direct path", 15)
    assert one.stop() == 0
    assert direct_routes(one) == set()
    assert two.stop() == 0
    two.tables["underlay"] = {"direct": "off"}
    two.start()
    until(lambda: direct_routes(two) == set(), "the end of the routes")


def direct_routes(node: Node) -> set[str]:
    """Destinations of routes with our mark by the node's link."""
    shown = [
        node.namespace.ip_json(family, "route", "show", "proto", "71", "dev", "eth0")
        for family in ("-4", "-6")
    ]
    return {route["dst"] for routes in shown for route in routes}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["route", "link"])
def test_what_others_undo_is_done_again(segment: Segment, netns: Callable[[], Namespace], spoil: str) -> None:
    segment.start((4,))
    one, _ = segment.nodes
    until(lambda: all_by(segment, "direct", {4}), "the direct path")
    if spoil == "route":
        one.namespace.ip("route", "del", "10.42.2.0/24", "proto", "71", "dev", "eth0")
    else:
        one.namespace.ip("link", "set", "eth0", "down")
        until(lambda: paths(one)[4] == "tunnel", "the tunnel")
        one.namespace.ip("link", "set", "eth0", "up")
    until(lambda: direct_routes(one) == {"10.42.2.0/24"}, "the route")
    until(lambda: all_by(segment, "direct", {4}), "the direct path", 15)


def test_ipv4_goes_by_an_ipv6_segment(segment: Segment, netns: Callable[[], Namespace]) -> None:
    for node in segment.nodes:
        node.namespace.ip("addr", "flush", "dev", "eth0", "scope", "global")
        node.namespace.ip("addr", "add", f"2001:db8::{node.number}/64", "dev", "eth0", "nodad")
    segment.start((6,))
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    before = segment.tunnelled()
    hashed(pods)
    assert segment.tunnelled() == before


@pytest.mark.slow
def test_a_daemon_that_died_is_not_missed(segment: Segment, netns: Callable[[], Namespace]) -> None:
    """Its node's kernel has all it needs, and its peer knows that the tunnel is no better."""
    one, two = segment.nodes
    for node in segment.nodes:
        node.tables["health"] = {"interval_seconds": 1}
    segment.start(features=("direct", "health"))
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    until(lambda: one.ask("peers")[0]["health"]["state"] == "up", "the peer's health")
    assert two.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: "nothing in the tunnel" in why(one), "the last resort")
    hashed(pods)
    two.start()
    until(lambda: why(one) == "on-link by eth0", "the usual way", 15)


@pytest.mark.slow
def test_what_is_no_bfd_for_us_is_counted(segment: Segment) -> None:
    one, two = segment.nodes
    segment.start((4,))
    until(lambda: all_by(segment, "direct", {4}), "the direct path")

    def send(*packets: tuple[int, bytes]) -> None:
        for hop_limit, data in packets:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hop_limit)
                sender.bind(("10.42.2.1", 0))
                sender.sendto(data, ("10.42.1.1", 4784))

    in_namespace(
        two.namespace, send, (64, bytes(24)), (255, b""), (255, bytes(24)), (255, b"\x20" + bytes(23))
    )
    until(lambda: sum(one.ask("drops")["bfd"].values()) >= 4, "the drops")
    assert one.ask("drops")["bfd"] == {"hop_limit": 1, "short": 1, "version": 1, "length": 1}
    assert "hop_limit" in one.run("drops").stdout
    assert all_by(segment, "direct", {4})


@pytest.mark.slow
def test_ipv6_does_not_go_by_an_ipv4_segment(segment: Segment, netns: Callable[[], Namespace]) -> None:
    segment.start((4,))
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct", {4}), "the direct path")
    for node in segment.nodes:
        assert paths(node) == {4: "direct", 6: "tunnel"}
        assert "IPv6 endpoint" in why(node)
    hashed(pods)


@pytest.mark.slow
def test_both_nodes_must_want_it(segment: Segment) -> None:
    segment.start(features=())
    for node in segment.nodes:
        assert paths(node) == {4: "tunnel", 6: "tunnel"}
        assert 'the feature "direct"' in why(node)
        assert direct_routes(node) == set()


@pytest.mark.slow
def test_a_strict_filter_is_loosened_on_the_segments_link(
    segment: Segment, netns: Callable[[], Namespace]
) -> None:
    """It would drop what comes while this node's own way is the tunnel."""
    for node in segment.nodes:
        node.namespace.set_sysctl("net/ipv4/conf/eth0/rp_filter", "1")
        node.namespace.set_sysctl("net/ipv4/conf/eth0/forwarding", "0")
    segment.start()
    pods = add_pods(segment.nodes, netns)
    until(lambda: all_by(segment, "direct"), "the direct path")
    assert [node.namespace.sysctl("net/ipv4/conf/eth0/rp_filter") for node in segment.nodes] == ["2", "2"]
    hashed(pods)
