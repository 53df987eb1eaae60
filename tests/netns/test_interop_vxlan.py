"""Our node and the kernel's own VXLAN device are peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwarder.demo import netns
from forwarder.demo.features import switch_off
from forwarder.demo.lab import VNI, Host, Lab, Node, PeerRecord, link_index, netlink
from forwarder.demo.probes import Station
from tests.netns.foreign import (
    INNER_MTU,
    NO_CHECKSUM_OFFLOAD,
    NODAD,
    add_pod_behind,
    assert_they_talk,
)
from tests.netns.labs import new_lab

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

VXLAN_MAC = "02:76:78:00:00:01"
VIRTUAL_ROUTER = {4: "169.254.71.1", 6: "fe80::706f:646c"}
CLUSTER = {4: "10.71.0.0/16", 6: "fd71::/48"}
NUD_PERMANENT, NTF_SELF = 0x80, 0x02


@pytest.mark.parametrize("underlay", ["ipv4", "ipv6"])
def test_kernel_vxlan(underlay: str) -> None:
    """The kernel sends VXLAN without an outer checksum over IPv4 and with one over IPv6. Our node's own
    encapsulation is Geneve: what is sent to a peer is the peer's property."""
    with new_lab("geneve", underlay) as lab:
        node, kernel = lab.add_node(), lab.add_host("kernel")
        # Across a veth the kernel's VXLAN hands a plain socket TCP superframes whole and never finishes inner
        # checksums: it takes the veth for a card that will (tests/assumptions/test_vxlan.py). Until our decap
        # knows such frames, this peer sends as it would through a card.
        switch_off(
            kernel.namespace,
            "eth0",
            "tx-udp_tnl-segmentation",
            "tx-udp_tnl-csum-segmentation",
            *NO_CHECKSUM_OFFLOAD,
        )
        add_vxlan(kernel, node, underlay)
        theirs = add_routed_pod(lab, kernel, INNER_MTU[underlay])
        lab.add_foreign_peer(
            PeerRecord(
                id="kernel",
                endpoints=(kernel.underlay[underlay],),
                encapsulation="vxlan",
                router_mac=VXLAN_MAC,
                prefixes=tuple(str(prefix) for prefix in kernel.prefixes),
            )
        )
        lab.start()
        pod = lab.add_pod(node, "p1")
        assert_they_talk(lab, node, Station(pod.name, pod.namespace, pod.ips), theirs)


def add_vxlan(kernel: Host, node: Node, underlay: str) -> None:
    """A VXLAN device that learns nothing: the way to our node is one route and one neighbour for each
    inner family, and one FDB entry. It addresses our node's router MAC; we address the device's own."""
    local = {"vxlan_local" if underlay == "ipv4" else "vxlan_local6": kernel.underlay[underlay]}
    with netlink(kernel.namespace) as ip:
        ip.link(
            "add",
            ifname="vx",
            kind="vxlan",
            address=VXLAN_MAC,
            mtu=INNER_MTU[underlay],
            vxlan_id=VNI,
            vxlan_port=4789,
            vxlan_learning=0,
            **local,
        )
        index = link_index(ip, "vx")
        ip.link("set", index=index, state="up")
        entry = {"lladdr": node.router_mac, "dst": node.underlay[underlay]}
        ip.fdb("add", ifindex=index, state=NUD_PERMANENT, flags=NTF_SELF, **entry)
        for version, router in VIRTUAL_ROUTER.items():
            ip.neigh("add", dst=router, lladdr=node.router_mac, ifindex=index, state=NUD_PERMANENT)
            ip.route("add", dst=CLUSTER[version], gateway=router, oif=index, flags=["onlink"])


def add_routed_pod(lab: Lab, kernel: Host, mtu: int) -> Station:
    pod = add_pod_behind(lab, kernel, mtu)
    with netns.inside(kernel.namespace):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    with netlink(kernel.namespace) as ip:
        index = link_index(ip, "pod0")
        for gateway, prefix in zip(kernel.gateways, kernel.prefixes, strict=True):
            options = NODAD if prefix.version == 6 else {}
            ip.addr("add", index=index, address=gateway, prefixlen=prefix.prefixlen, **options)
    return pod
