"""The systems that are compared: each is a lab of its own with two pods that it has joined.

What cannot be set up here raises LabError, and is shown as absent with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.compare import wire
from bench.compare.openvswitch import join_by_openvswitch
from bench.compare.pods import Pair, add_routed_pod, bridge, ip, pod_address, run, start
from forwarder.demo.lab import VNI, Host, Lab, LabError

VXLAN_MTU = 1450
WIREGUARD_MTU = 1420
VIRTUAL_ROUTER = "169.254.71.1"
WIREGUARD_SOCKETS = Path("/var/run/wireguard")
READY_SECONDS = 10.0

# The rungs: what of [offload] differs from the default.
RUNGS = {
    "plain": dict.fromkeys(
        ("tso", "uso", "udp_segment", "udp_gro", "merge_tcp", "merge_udp", "threaded_napi"), "false"
    )
    | {"uplink": '"off"'},
    "gso": {"uplink": '"off"'},
    "uplink": {"uplink": '"on"'},
}


@dataclass(frozen=True)
class System:
    name: str
    about: str
    join: Callable[[str, str], AbstractContextManager[Pair]]
    """(name for its lab, wire) -> two pods."""
    optional: bool = False
    """It may be absent: not installed, or not in this kernel."""


@contextmanager
def _hosts(name: str, kind: str) -> Iterator[tuple[Lab, Host, Host]]:
    """A lab with two hosts, and the wire between them."""
    with Lab(name) as lab:
        one, other = lab.add_host("a"), lab.add_host("b")
        wire.lay(kind, one, other)
        yield lab, one, other


@contextmanager
def _veth(name: str, kind: str) -> Iterator[Pair]:
    with _hosts(name, kind) as (lab, one, other):
        client, server = (add_routed_pod(lab, host, 1500) for host in (one, other))
        for here, there in ((one, other), (other, one)):
            ip(here.namespace, f"route add {there.prefixes[0]} via {there.underlay['ipv4']} dev eth0")
        yield Pair(client, server, pod_address(other))


@contextmanager
def _kernel_vxlan(name: str, kind: str) -> Iterator[Pair]:
    """What our nodes do, done by the kernel: one route and one neighbour lead to the tunnel, which is an
    isolated port that learns nothing."""
    with _hosts(name, kind) as (lab, one, other):
        client, server = (add_routed_pod(lab, host, VXLAN_MTU) for host in (one, other))
        for here, there in ((one, other), (other, one)):
            local = f"local {here.underlay['ipv4']}"
            ip(
                here.namespace,
                f"""link add vx0 mtu {VXLAN_MTU} type vxlan id {VNI} dstport 4789 {local} nolearning
                    link set vx0 master loom0 up
                    route add {there.prefixes[0]} via {VIRTUAL_ROUTER} dev loom0 onlink
                    neighbour add {VIRTUAL_ROUTER} lladdr {there.router_mac} dev loom0 nud permanent""",
            )
            bridge(
                here.namespace,
                f"""link set dev vx0 isolated on learning off flood off
                    fdb add {there.router_mac} dev vx0 master static
                    fdb add {there.router_mac} dev vx0 dst {there.underlay["ipv4"]}""",
            )
        yield Pair(client, server, pod_address(other))


@contextmanager
def _podloom(rung: str, encapsulation: str, name: str, kind: str) -> Iterator[Pair]:
    """The product as it is: daemons started from a config file, pods attached by the CNI plugin."""
    offload = "\n".join(f"{key} = {value}" for key, value in RUNGS[rung].items())
    with Lab(name, encapsulation=encapsulation, extra_config=f"[offload]\n{offload}\n") as lab:
        one, other = lab.add_node(), lab.add_node()
        wire.lay(kind, one, other)
        lab.start()
        for node in (one, other):
            uplink = lab.ask(node, "status")["offloads"]["uplink"]
            if rung == "uplink" and not uplink["on"]:
                raise LabError(f"no uplink on {node.name}: {uplink['reason']}")
        client, server = lab.add_pod(one, "a"), lab.add_pod(other, "b")
        pids = tuple(lab.daemon(node).pid for node in (one, other))
        address = next(address for address in server.ips if ":" not in address)
        yield Pair(client.namespace, server.namespace, address, pids)


@contextmanager
def _wireguard_go(name: str, kind: str) -> Iterator[Pair]:
    _require("wireguard-go", "wireguard-go")
    _require("wg", "wireguard-tools")
    with _hosts(name, kind) as (lab, one, other), ExitStack() as stack:
        client, server = (add_routed_pod(lab, host, WIREGUARD_MTU) for host in (one, other))
        keys = {host: run(host.namespace, "wg", "genkey") for host in (one, other)}
        # Its control sockets are in one directory for the machine: a link's name has to be its own.
        links = {host: f"wg{os.getpid():x}{host.name}" for host in (one, other)}
        pids = []
        for here, there in ((one, other), (other, one)):
            link = links[here]
            socket = WIREGUARD_SOCKETS / f"{link}.sock"
            stack.callback(socket.unlink, missing_ok=True)
            command = ("wireguard-go", "--foreground", link)
            process = start(
                stack, here.namespace, *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            pids.append(process.pid)
            _wait_for(socket, process)
            public = run(there.namespace, "wg", "pubkey", text=keys[there]).strip()
            run(
                here.namespace,
                *("wg", "set", link, "listen-port", "51820", "private-key", "/dev/stdin", "peer", public),
                *("allowed-ips", str(there.prefixes[0]), "endpoint", f"{there.underlay['ipv4']}:51820"),
                text=keys[here],
            )
            ip(
                here.namespace,
                f"""link set {link} mtu {WIREGUARD_MTU} up
                    route add {there.prefixes[0]} dev {link}""",
            )
        yield Pair(client, server, pod_address(other), tuple(pids))


@contextmanager
def _openvswitch(name: str, kind: str) -> Iterator[Pair]:
    _require("ovs-vswitchd", "openvswitch-switch")
    with _hosts(name, kind) as (lab, one, other), join_by_openvswitch(lab, one, other) as pair:
        yield pair


def _require(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise LabError(f"{program} is not installed (Debian package {package})")


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not path.exists():
        if process.poll() is not None:
            raise LabError(f"{process.args!r} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise LabError(f"{path} did not appear in {READY_SECONDS:.0f} s")
        time.sleep(0.01)


SYSTEMS = {
    system.name: system
    for system in (
        System("veth", "no overlay: plain routes between the nodes", _veth),
        System("kernel-vxlan", "the kernel's own VXLAN device: the yardstick", _kernel_vxlan),
        *(
            System(
                f"podloom-{rung}-{encapsulation}",
                f"podloom, {about}",
                partial(_podloom, rung, encapsulation),
                optional=rung == "uplink",
            )
            for rung, about in (
                ("uplink", "every offload and the tunnel-GSO uplink"),
                ("gso", "every offload but the uplink: superframes, UDP_SEGMENT, UDP_GRO, merging"),
                ("plain", "no offload at all"),
            )
            for encapsulation in ("geneve", "vxlan")
        ),
        System("openvswitch-geneve", "Open vSwitch's user-space datapath", _openvswitch, optional=True),
        System("wireguard-go", "wireguard-go over a TUN; it encrypts", _wireguard_go, optional=True),
    )
}
