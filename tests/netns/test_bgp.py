"""Nodes on networks of their own hand their prefixes to a BIRD each, and a BIRD between routes their pods."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.nodes import Node, until
from tests.netns.test_direct import add_pods, hashed, paths, seconds_until_answered
from tests.netns.test_path_mtu import UNDERLAY, wire
from tests.netns_tools import Namespace, run

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

TOR = 65000
FALL_SECONDS = 3.0

COMMON = """\
log stderr all;
protocol device {{ }}
protocol kernel {{ ipv4 {{ export where source = RTS_BGP; }}; }}
protocol kernel {{ ipv6 {{ export where source = RTS_BGP; }}; }}
template bgp quick {{
  connect delay time 1;
  connect retry time 1;
  error wait time 1, 2;
  local as {own};
}}
"""

SESSION = """\
protocol bgp {name}v{version} from quick {{
  neighbor {address} as {neighbour};
  ipv{version} {{ import all; export {export}; }};
}}
"""


@dataclass
class Bird:
    """A BIRD in a namespace, its files in a directory."""

    namespace: Namespace
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def control_socket(self) -> Path:
        return self.directory / "bird.ctl"

    @property
    def include(self) -> Path:
        return self.directory / "podloom.conf"

    def start(self, config: str) -> None:
        path = self.directory / "bird.conf"
        path.write_text(config)
        words = [
            "bird",
            "-f",
            "-c",
            str(path),
            "-s",
            str(self.control_socket),
            "-P",
            str(self.directory / "pid"),
        ]
        with (self.directory / "bird.log").open("a") as log:
            self.process = subprocess.Popen(self.namespace.command(words), stdout=log, stderr=log)
        until(self.control_socket.exists, "BIRD's control socket")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(10)
            self.process = None

    def ctl(self, *words: str) -> str:
        return run(["birdc", "-s", str(self.control_socket), *words])


@dataclass
class Fabric:
    """Two nodes, each on a network of its own, and a router between that is its neighbour in BGP."""

    nodes: tuple[Node, Node]
    birds: tuple[Bird, Bird]
    router: Namespace
    tor: Bird

    def start(self) -> None:
        one, two = self.nodes
        for node, other, bird in ((one, two, self.birds[0]), (two, one, self.birds[1])):
            node.tables["node"]["endpoints"] = [UNDERLAY[4].format(node.number, node.number)]
            other.tables["node"]["endpoints"] = [UNDERLAY[4].format(other.number, other.number)]
            node.tables["bgp"] = {"include": str(bird.include), "control_socket": str(bird.control_socket)}
            node.write_peers(other.record())
        for node in self.nodes:
            node.start()

    def start_birds(self) -> None:
        self.tor.start(
            "router id 192.0.2.254;\n"
            + COMMON.format(own=TOR)
            + "".join(
                SESSION.format(
                    name=f"n{node.number}",
                    version=version,
                    address=UNDERLAY[version].format(node.number, node.number),
                    neighbour=TOR + node.number,
                    export="all",
                )
                for node in self.nodes
                for version in (4, 6)
            )
        )
        for number in range(2):
            self.start_bird(number)

    def start_bird(self, number: int) -> None:
        node, bird = self.nodes[number], self.birds[number]
        if not bird.include.exists():
            bird.include.touch()
        bird.start(
            f"router id 192.0.{node.number}.{node.number};\n"
            + COMMON.format(own=TOR + node.number)
            + f'include "{bird.include}";\n'
            + "".join(
                SESSION.format(
                    name="tor",
                    version=version,
                    address=UNDERLAY[version].format(node.number, 254),
                    neighbour=TOR,
                    export=f'where proto = "podloom{version}"',
                )
                for version in (4, 6)
            )
        )

    def both_by(self, path: str) -> bool:
        return all(paths(node) == {4: path, 6: path} for node in self.nodes)

    def tunnelled(self) -> int:
        shown = run(self.router.command(["nft", "list", "counter", "inet", "count", "tunnels"]))
        return int(shown.partition("packets ")[2].split()[0])


@pytest.fixture
def fabric(netns: Callable[[], Namespace], tmp_path: Path) -> Iterator[Fabric]:
    for program in ("bird", "nft"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"no {program}: BGP is NOT tested in this run")
    with ExitStack() as undo:
        nodes = Node(1, netns(), tmp_path / "n1"), Node(2, netns(), tmp_path / "n2")
        router = netns()
        for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            router.set_sysctl(name, "1")
        birds = []
        for number, namespace in enumerate((nodes[0].namespace, nodes[1].namespace, router)):
            (tmp_path / f"bird{number}").mkdir()
            birds.append(Bird(namespace, tmp_path / f"bird{number}"))
        for node in nodes:
            undo.callback(node.clean_up)
            wire(node, router)
        for bird in birds:
            undo.callback(bird.stop)
        lines = [
            "table inet count {",
            "  counter tunnels { }",
            "  chain forward {",
            "    type filter hook forward priority 0;",
            "    udp dport { 6081, 4789 } counter name tunnels",
            "  }",
            "}",
            "",
        ]
        run(router.command(["nft", "-f", "-"]), input="\n".join(lines))
        yield Fabric(nodes, (birds[0], birds[1]), router, birds[2])


def test_pods_are_routed_and_fall_to_the_tunnel_when_routes_are_withdrawn(
    fabric: Fabric, netns: Callable[[], Namespace]
) -> None:
    fabric.start()
    assert "cannot be reached" in fabric.nodes[0].ask("status")["bgp"]["fault"]
    fabric.start_birds()
    pods = add_pods(fabric.nodes, netns)
    until(lambda: fabric.both_by("bgp"), "BGP")
    before = fabric.tunnelled()
    hashed(pods)
    assert fabric.tunnelled() == before
    assert "bgp: " in fabric.nodes[0].run("peers").stdout
    until(lambda: fabric.nodes[0].ask("status")["bgp"] == {"fault": None}, "BIRD is told")

    fabric.tor.ctl("disable", "n2v4")
    fabric.tor.ctl("disable", "n2v6")
    assert seconds_until_answered(pods) < FALL_SECONDS
    until(lambda: fabric.both_by("tunnel"), "the tunnel")
    before = fabric.tunnelled()
    hashed(pods)
    assert fabric.tunnelled() > before

    fabric.tor.ctl("enable", "n2v4")
    fabric.tor.ctl("enable", "n2v6")
    until(lambda: fabric.both_by("bgp"), "BGP", 20)
    before = fabric.tunnelled()
    hashed(pods)
    assert fabric.tunnelled() == before


@pytest.mark.slow
def test_birds_end_and_ours_leave_the_other_right(fabric: Fabric, netns: Callable[[], Namespace]) -> None:
    """A BIRD that ends takes its routes along; a node that is taken down withdraws its prefixes."""
    fabric.start_birds()
    one, two = fabric.nodes
    two.tables["links"] = {"keep_on_exit": False}
    fabric.start()
    pods = add_pods(fabric.nodes, netns)
    until(lambda: fabric.both_by("bgp"), "BGP", 20)
    fabric.birds[0].stop()
    until(lambda: fabric.both_by("tunnel"), "the tunnel")
    hashed(pods)
    fabric.start_bird(0)
    until(lambda: fabric.both_by("bgp"), "BGP", 20)
    assert two.stop() == 0
    until(lambda: paths(one) == {4: "tunnel", 6: "tunnel"}, "the withdrawal")
    assert "route" not in fabric.birds[1].include.read_text()


@pytest.mark.slow
def test_a_bird_that_refuses_says_why(fabric: Fabric) -> None:
    fabric.start_birds()
    config = fabric.birds[0].directory / "bird.conf"
    config.write_text(config.read_text() + "protocol nonsense { }\n")
    fabric.start()
    one, _ = fabric.nodes
    until(lambda: "bird.conf" in one.ask("status")["bgp"]["fault"], "the reason")
    assert "syntax error" in one.run("status").stdout
    assert one.log.count("syntax error") == 1
