"""Our node joins a cluster of flannel's VXLAN nodes: kernel devices set up as flannel does (v0.26,
pkg/backend/vxlan), which know each other by annotations of Node objects."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from forwarder.demo import netns
from forwarder.demo.features import switch_off
from forwarder.demo.lab import CLUSTER, START_SECONDS, UNDERLAY, Host, Lab, Node, link_index, netlink, popen
from forwarder.demo.probes import Station, ping
from tests import kube_api
from tests.netns.foreign import NO_CHECKSUM_OFFLOAD, NODAD, add_pod_behind, assert_they_talk
from tests.netns.labs import new_lab
from tests.netns.nodes import until

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

FLANNEL = "flannel.alpha.coreos.com/"
VNI, PORT = 1, 8472
MACS = {4: "5e:3b:0a:00:00:04", 6: "5e:3b:0a:00:00:06"}
DEVICES = {4: f"flannel.{VNI}", 6: f"flannel-v6.{VNI}"}
DEVICE_MTU = {4: 1450, 6: 1430}
"""flannel takes 50 for IPv6 too, which is 20 short of what VXLAN over IPv6 adds."""
FAMILY = {4: "ipv4", 6: "ipv6"}
NUD_PERMANENT, NTF_SELF = 0x80, 0x02
API = str(UNDERLAY["ipv4"][-2])


@pytest.mark.parametrize("versions", [(4,), (4, 6)], ids=["IPv4", "dual stack"])
def test_a_node_among_flannels(versions: tuple[int, ...]) -> None:
    with new_lab() as lab:
        ours, kernel = lab.add_node(), lab.add_host("kernel")
        # As through a network card: tests/netns/test_interop_vxlan.py says why.
        switch_off(
            kernel.namespace,
            "eth0",
            "tx-udp_tnl-segmentation",
            "tx-udp_tnl-csum-segmentation",
            *NO_CHECKSUM_OFFLOAD,
        )
        for version in versions:
            add_flannel_device(kernel, version)
        annotations = flannel_annotations(kernel, versions)
        nodes = {
            "ours": kube_api.node("ours", *pod_cidrs(ours, versions), unavailable=True),
            "kernel": kube_api.node("kernel", *pod_cidrs(kernel, versions), annotations=annotations),
        }
        file = ours.directory / "nodes.json"
        file.write_text(json.dumps(nodes))
        with api_server(lab, file):
            lab.launch(ours, config(ours, versions))
            lab.wait_ready(ours, time.monotonic() + START_SECONDS)
            until(lambda: "backend-data" in str(annotations_in(file, "ours")), "our annotations")
            said = annotations_in(file, "ours")
            assert said[FLANNEL + "kube-subnet-manager"] == "true"
            assert said[FLANNEL + "public-ip"] == ours.underlay["ipv4"]
            assert json.loads(said[FLANNEL + "backend-data"]) == {"VNI": VNI, "VtepMAC": ours.router_mac}
            assert not any(name.startswith("podloom.dev/") for name in said)
            for version in versions:
                add_lease(kernel, version, said, pod_cidrs(ours, (version,))[0])
            peers = {peer["id"]: peer["router_mac"] for peer in lab.ask(ours, "peers")}
            names = {4: "kernel", 6: "kernel.v6"}
            assert peers == {names[version]: MACS[version] for version in versions}

            theirs = add_routed_pod(lab, kernel)
            pod = lab.add_pod(ours, "p1")
            theirs = only(theirs, versions)
            assert_they_talk(lab, ours, Station(pod.name, pod.namespace, pod.ips), theirs)
            # A host of flannel's speaks from its device's address, the first of its prefix.
            host = Station("kernel's host", kernel.namespace, ())
            assert ping([(host, only(Station(pod.name, pod.namespace, pod.ips), versions))]).lost == ()


def pod_cidrs(host: Host, versions: tuple[int, ...]) -> list[str]:
    return [str(prefix) for prefix in host.prefixes if prefix.version in versions]


def only(station: Station, versions: tuple[int, ...]) -> Station:
    ips = tuple(ip for ip in station.ips if (6 if ":" in ip else 4) in versions)
    return Station(station.name, station.namespace, ips)


def annotations_in(file: Path, name: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(file.read_text())[name]["metadata"]["annotations"]
    return found


def flannel_annotations(kernel: Host, versions: tuple[int, ...]) -> dict[str, str]:
    found = {FLANNEL + "kube-subnet-manager": "true", FLANNEL + "backend-type": "vxlan"}
    for version, (address, data) in {
        4: ("public-ip", "backend-data"),
        6: ("public-ipv6", "backend-v6-data"),
    }.items():
        if version in versions:
            found[FLANNEL + address] = kernel.underlay[FAMILY[version]]
            found[FLANNEL + data] = f'{{"VNI":{VNI},"VtepMAC":"{MACS[version]}"}}'
    return found


def add_flannel_device(kernel: Host, version: int) -> None:
    """A device without learning, bound to the uplink, with the prefix's first address as a /32 or /128."""
    prefix = next(prefix for prefix in kernel.prefixes if prefix.version == version)
    local = {"vxlan_local" if version == 4 else "vxlan_local6": kernel.underlay[FAMILY[version]]}
    with netlink(kernel.namespace) as ip:
        ip.link(
            "add",
            ifname=DEVICES[version],
            kind="vxlan",
            address=MACS[version],
            mtu=DEVICE_MTU[version],
            vxlan_id=VNI,
            vxlan_port=PORT,
            vxlan_learning=0,
            vxlan_link=link_index(ip, "eth0"),
            **local,
        )
        index = link_index(ip, DEVICES[version])
        options = NODAD if version == 6 else {}
        address = str(prefix.network_address)
        ip.addr("add", index=index, address=address, prefixlen=prefix.max_prefixlen, **options)
        ip.link("set", index=index, state="up")


def add_lease(kernel: Host, version: int, annotations: dict[str, str], pod_cidr: str) -> None:
    """What flannel does when it sees a node: a neighbour, an FDB entry and a route, in this order."""
    data = json.loads(annotations[FLANNEL + ("backend-data" if version == 4 else "backend-v6-data")])
    public = annotations[FLANNEL + ("public-ip" if version == 4 else "public-ipv6")]
    gateway = str(ip_network(pod_cidr).network_address)
    with netlink(kernel.namespace) as ip:
        index = link_index(ip, DEVICES[version])
        ip.neigh("add", dst=gateway, lladdr=data["VtepMAC"], ifindex=index, state=NUD_PERMANENT)
        ip.fdb("add", ifindex=index, state=NUD_PERMANENT, flags=NTF_SELF, lladdr=data["VtepMAC"], dst=public)
        ip.route("add", dst=pod_cidr, gateway=gateway, oif=index, flags=["onlink"])


def add_routed_pod(lab: Lab, kernel: Host) -> Station:
    pod = add_pod_behind(lab, kernel, min(DEVICE_MTU.values()))
    with netns.inside(kernel.namespace):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    with netlink(kernel.namespace) as ip:
        index = link_index(ip, "pod0")
        for gateway, prefix in zip(kernel.gateways, kernel.prefixes, strict=True):
            options = NODAD if prefix.version == 6 else {}
            ip.addr("add", index=index, address=gateway, prefixlen=prefix.prefixlen, **options)
    return pod


@contextmanager
def api_server(lab: Lab, file: Path) -> Iterator[str]:
    """A Kubernetes API server on the wire; its URL."""
    with netlink(lab.wire) as ip:
        ip.link("set", index=link_index(ip, "lo"), state="up")
        prefixlen = UNDERLAY["ipv4"].prefixlen
        ip.addr("add", index=link_index(ip, "wire"), address=API, prefixlen=prefixlen)
    command = [sys.executable, "-m", "tests.kube_api", API, "8080", str(file)]
    with popen(lab.wire, command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"serving\n"
            yield f"http://{API}:8080"
        finally:
            server.kill()


def kubeconfig(ours: Node) -> Path:
    """For the API server above."""
    path = ours.directory / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "current-context": "it",
                "contexts": [{"name": "it", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://{API}:8080"}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    return path


def config(ours: Node, versions: tuple[int, ...]) -> str:
    tables: dict[str, dict[str, Any]] = {
        "cluster": {"cidrs": [str(cidr) for cidr in CLUSTER if cidr.version in versions], "vni": VNI},
        "node": {
            "endpoints": [ours.underlay[FAMILY[version]] for version in versions],
            "router_mac": ours.router_mac,
            "state_dir": str(ours.directory / "state"),
            "run_dir": str(ours.control_socket.parent),
        },
        "tunnel": {"encapsulation": "vxlan", "vxlan_ports": [PORT]},
        "discovery": {
            "source": "kubernetes",
            "kubeconfig": str(kubeconfig(ours)),
            "node_name": "ours",
            "compat": "flannel",
        },
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)
