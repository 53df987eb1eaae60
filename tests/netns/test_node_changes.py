"""Nodes whose host changes under them: addresses, devices, MTUs, and what is ours in the kernel. The daemon
runs on, pods keep their links, and traffic comes back by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forwarder.demo.lab import CLUSTER, VNI, Etcd, Lab, Node
from forwarder.demo.probes import Station, ping
from tests.netns.labs import new_lab
from tests.netns.nodes import until
from tests.netns.transfer import Transfer

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

CONVERGED_SECONDS = 5.0
"""What the issue allows from a change to traffic."""
PING_SECONDS = 0.3
WORKER_DESCRIPTORS = 24


@contextmanager
def two_nodes(source: str, device: str = "", underlay: str = "ipv4", extra_config: str = "") -> Iterator[Lab]:
    """Two nodes with a pod each. `device` is the first one's, which has its address of the underlay else."""
    with new_lab(source=source, underlay=underlay, extra_config=extra_config) as lab:
        for _ in range(2):
            lab.add_node()
        one, two = lab.nodes
        lab.launch(one, configuration(lab, one, underlay, device))
        lab.launch(two, configuration(lab, two, underlay))
        for node in lab.nodes:
            lab.wait_ready(node, time.monotonic() + 15)
        for node, name in zip(lab.nodes, ("a", "b"), strict=True):
            lab.add_pod(node, name)
        until(lambda: pings(lab), "the pods' first ping")
        try:
            yield lab
        except BaseException:
            for node in lab.nodes:
                print(f"{node.name}: {node.log_file.read_text()}")  # noqa: T201
            raise


def configuration(lab: Lab, node: Node, underlay: str, device: str = "") -> str:
    place = f'device = "{device}"' if device else f'endpoints = ["{node.underlay[underlay]}"]'
    if hasattr(lab, "etcd"):
        discovery = (
            f'source = "etcd"\nurls = ["{lab.etcd.url}"]\n'
            f"lease_seconds = {Etcd.LEASE_SECONDS}\nhold_seconds = {Etcd.HOLD_SECONDS}\n"
        )
    else:
        discovery = f'file = "{node.peers_file}"'
    return f"""
[cluster]
cidrs = ["{CLUSTER[0]}", "{CLUSTER[1]}"]
vni = {VNI}
[node]
id = "{node.name}"
router_mac = "{node.router_mac}"
{place}
prefixes = ["10.71.{node.index}.0/24", "fd71:0:0:{node.index:x}::/64"]
state_dir = "{node.directory / "state"}"
run_dir = "{node.control_socket.parent}"
ip_masquerade = false
[discovery]
{discovery}
"""


def pings(lab: Lab) -> bool:
    """Whether echoes come back, both ways and in both families."""
    one, two = (Station(pod.name, pod.namespace, pod.ips) for pod in lab.pods)
    return not ping([(one, two), (two, one)], PING_SECONDS).lost


def ip(node: Node, *words: str) -> str:
    return run(["ip", "-n", node.namespace.name, *words])


def run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def link(namespace: Path, name: str) -> dict[str, Any]:
    (found,) = json.loads(run(["ip", "-n", namespace.name, "-d", "-j", "link", "show", name]))
    return dict(found)


def converge(lab: Lab) -> None:
    """Traffic is back in the time that the issue allows."""
    began = time.monotonic()
    until(lambda: pings(lab), "traffic", CONVERGED_SECONDS)
    print(f"traffic again after {time.monotonic() - began:.2f} s")  # noqa: T201


@contextmanager
def undisturbed(lab: Lab, *, links: bool = True) -> Iterator[None]:
    """The first node's daemon runs on, with its links, and it has no more descriptors than it needs."""
    (one, _), daemon = lab.nodes, lab.daemon(lab.nodes[0])

    def indices() -> list[int]:
        return [link(one.namespace, name)["ifindex"] for name in ("loom0", "loom-tap") if links]

    def sockets() -> int:
        proc = Path(f"/proc/{daemon.pid}/net")
        return sum(len((proc / name).read_text().splitlines()) for name in ("udp", "udp6"))

    def descriptors() -> int:
        return sum(1 for _ in Path(f"/proc/{daemon.pid}/fd").iterdir())

    before = indices(), sockets(), descriptors()
    yield
    assert daemon.poll() is None
    until(lambda: lab.ask(one, "status")["fault"] is None, "the end of the fault")
    until(lambda: (indices(), sockets()) == before[:2], f"{before}, not {indices()}, {sockets()}", 3)
    # Each of the worker threads has a loop of its own for netlink, when it has come to use it.
    assert descriptors() <= before[2] + WORKER_DESCRIPTORS


def readdress(node: Node, new: str) -> None:
    """As a DHCP client does whose lease is another now."""
    ip(node, "addr", "del", f"{node.underlay['ipv4']}/24", "dev", "eth0")
    ip(node, "addr", "add", f"{new}/24", "dev", "eth0")


def test_an_address_that_changes_is_announced(etcd_installed: None) -> None:
    with two_nodes("etcd", device="eth0") as lab, undisturbed(lab):
        one, two = lab.nodes
        assert lab.ask(one, "status")["endpoints"] == [one.underlay["ipv4"]]
        readdress(one, "192.0.2.101")
        converge(lab)
        assert lab.ask(one, "status")["endpoints"] == ["192.0.2.101"]
        assert [peer["endpoint"] for peer in lab.ask(two, "peers")] == ["192.0.2.101"]
        until(lambda: lab.ask(one, "status")["discovery"]["unannounced"] is None, "the announcement")
        time.sleep(Etcd.LEASE_SECONDS)  # The lease of the first record is over.
        assert pings(lab)


@pytest.fixture
def etcd_installed() -> None:
    if not Path("/usr/bin/etcd").exists():
        pytest.skip("no etcd (Debian package etcd-server): a re-announcement is NOT tested here")


def test_an_address_that_changes_by_the_files() -> None:
    """The other side's file is changed by hand, and so is our configuration."""
    with two_nodes("static") as lab, undisturbed(lab):
        one, two = lab.nodes
        readdress(one, "192.0.2.101")
        one.config_file.write_text(one.config_file.read_text().replace('192.0.2.1"', '192.0.2.101"'))
        two.peers_file.write_text(two.peers_file.read_text().replace('192.0.2.1"', '192.0.2.101"'))
        lab.daemon(one).send_signal(signal.SIGHUP)
        converge(lab)
        assert lab.ask(one, "status")["endpoints"] == ["192.0.2.101"]


def cut_link(node: Node) -> Callable[[], None]:
    ip(node, "link", "set", "eth0", "down")
    return lambda: give_back(node)


def take_address(node: Node) -> Callable[[], None]:
    ip(node, "addr", "flush", "dev", "eth0")
    return lambda: give_back(node)


def remove_device(node: Node) -> Callable[[], None]:
    ip(node, "link", "del", "eth0")

    def make_again() -> None:
        wire = f"{node.namespace.name.rpartition('-')[0]}-wire"
        here = ["eth0", "netns", node.namespace.name]
        run(["ip", "-n", wire, "link", "add", node.name, "type", "veth", "peer", *here])
        run(["ip", "-n", wire, "link", "set", node.name, "master", "wire", "up"])
        give_back(node)

    return make_again


def give_back(node: Node) -> None:
    ip(node, "link", "set", "eth0", "up")
    ip(node, "addr", "replace", f"{node.underlay['ipv4']}/24", "dev", "eth0")
    ip(node, "addr", "replace", f"{node.underlay['ipv6']}/64", "dev", "eth0", "nodad")


@pytest.mark.parametrize(
    ("harm", "device", "underlay"),
    [
        pytest.param(cut_link, "", "ipv4", marks=pytest.mark.slow),
        (cut_link, "", "ipv6"),  # The kernel takes IPv6 addresses from a link that is down.
        pytest.param(take_address, "eth0", "ipv4", marks=pytest.mark.slow),
        pytest.param(remove_device, "", "ipv4", marks=pytest.mark.slow),
        (remove_device, "eth0", "ipv4"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value or "address",
)
def test_an_uplink_that_flaps(harm: Callable[[Node], Callable[[], None]], device: str, underlay: str) -> None:
    with two_nodes("static", device, underlay) as lab, undisturbed(lab):
        one, _ = lab.nodes
        daemon = lab.daemon(one)
        end_of_harm = harm(one)
        used = cpu_seconds(daemon.pid)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert not pings(lab)
        assert cpu_seconds(daemon.pid) - used < 1.0, "it spins"
        assert lab.ask(one, "drops")["encap"]["udp_error"] > 0
        end_of_harm()
        converge(lab)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def set_underlay_mtu(lab: Lab, mtu_bytes: int) -> None:
    """Of the wire and both nodes' devices, as an operator does who lets jumbo frames in, or out again."""
    for node in lab.nodes:
        ip(node, "link", "set", "eth0", "mtu", str(mtu_bytes))
        run(["ip", "-n", lab.wire.name, "link", "set", node.name, "mtu", str(mtu_bytes)])


def test_an_mtu_that_changes_reaches_the_pods() -> None:
    with two_nodes("static", extra_config='[offload]\nuplink = "off"\n') as lab, undisturbed(lab):
        one = lab.nodes[0]
        one_pod, other_pod = lab.pods

        def mtus() -> set[int]:
            ports = json.loads(ip(one, "-j", "link", "show", "master", "loom0"))
            pods = [link(pod.namespace, "eth0") for pod in lab.pods]
            found = {entry["mtu"] for entry in (*ports, *pods, link(one.namespace, "loom0"))}
            return found | {lab.ask(one, "status")["mtu"], *(peer["mtu"] for peer in lab.ask(one, "peers"))}

        def segments() -> int:
            return int(link(one_pod.namespace, "eth0")["gso_max_segs"])

        assert (mtus(), segments()) == ({1450}, 44)
        with Transfer(one_pod.namespace, other_pod.namespace, other_pod.ips[0]) as transfer:
            transfer.goes_on()
            for underlay, inner, count in ((1400, 1350, 47), (3000, 2950, 22)):
                set_underlay_mtu(lab, underlay)
                until(lambda inner=inner: mtus() == {inner}, f"MTU {inner}, not {mtus()}", CONVERGED_SECONDS)
                until(lambda count=count: segments() == count, f"{count} segments")
                transfer.goes_on()
        set_underlay_mtu(lab, 1400)
        until(lambda: mtus() == {1350}, "the MTU")
        assert link(lab.add_pod(one, "later").namespace, "eth0")["mtu"] == 1350


DRIFT: dict[str, list[list[str]]] = {
    "route": [["route", "del", "10.71.0.0/16"], ["-6", "route", "del", "fd71::/48"]],
    "neighbour": [["neigh", "del", "169.254.71.1", "dev", "loom0"]],
    "another neighbour": [
        ["neigh", "replace", "169.254.71.1", "lladdr", "02:00:00:00:00:09", "dev", "loom0"]
    ],
    "bridge down": [["link", "set", "loom0", "down"]],
    "tap down": [["link", "set", "loom-tap", "down"]],
    "tap out of the bridge": [["link", "set", "loom-tap", "nomaster"]],
    "bridge's address": [["addr", "flush", "dev", "loom0"]],
    "small bridge": [["link", "set", "loom0", "mtu", "600"]],
    "bridge": [["link", "del", "loom0"]],
    "tap": [["link", "del", "loom-tap"]],
}


def test_what_is_altered_by_hand_is_put_right() -> None:
    with two_nodes("static") as lab, undisturbed(lab, links=False):
        one = lab.nodes[0]
        daemon = lab.daemon(one)
        for what, commands in DRIFT.items():
            before = one.log_file.read_text().count("put right in the kernel")
            for words in commands:
                ip(one, *words)
            began = time.monotonic()
            if what != "route":  # Who keeps the routes may have been quicker, and says nothing.
                until(
                    lambda before=before: one.log_file.read_text().count("put right in the kernel") > before,
                    f"{what}: the repair",
                    3,
                )
            until(lambda: pings(lab), f"{what}: traffic", 3)
            print(f"{what}: traffic after {time.monotonic() - began:.2f} s")  # noqa: T201
            assert daemon.poll() is None


def test_an_uplink_device_that_is_deleted_is_done_without() -> None:
    with two_nodes("static") as lab, undisturbed(lab):
        one, (here, there) = lab.nodes[0], lab.pods
        if not lab.ask(one, "status")["offloads"]["uplink"]["on"]:
            pytest.skip("this host has no uplink: its loss is NOT tested here")
        with Transfer(here.namespace, there.namespace, there.ips[0]) as transfer:
            transfer.goes_on()
            ip(one, "link", "del", "loom-up")
            transfer.goes_on()
        assert not lab.ask(one, "status")["offloads"]["uplink"]["on"]


def test_what_is_anothers_is_left_alone_and_told() -> None:
    """A route of somebody else's stands where ours must be, and goes again."""
    with two_nodes("static") as lab:
        one = lab.nodes[0]
        ip(one, "route", "replace", "10.71.0.0/16", "dev", "eth0", "proto", "99")
        ip(one, "link", "set", "loom-tap", "down")
        until(lambda: "was not made by podloom" in (lab.ask(one, "status")["fault"] or ""), "the fault")
        ip(one, "route", "del", "10.71.0.0/16", "proto", "99")
        until(lambda: lab.ask(one, "status")["fault"] is None, "its end", 6)
        converge(lab)
