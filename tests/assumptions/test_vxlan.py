"""How a kernel VXLAN device on the same machine reaches a plain UDP socket."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from forwarder.demo import netns
from forwarder.demo.features import switch_off
from forwarder.demo.lab import link_index, netlink
from tests.assumptions.conftest import Namespace
from tests.assumptions.kernel import (
    NUD_PERMANENT,
    UDP_GRO,
    disable_ipv6,
    set_up,
    udp_socket,
    veth,
)
from tests.reference.checksum import transport_is_valid

pytestmark = pytest.mark.root

VNI = 71
VXLAN_HEADER = struct.pack("!II", 0x08000000, VNI << 8)
OURS, THEIRS = ("192.0.2.1", "10.0.0.1"), ("192.0.2.2", "10.0.0.2")
OUR_MAC = "02:00:00:00:00:01"
SENT = 8000
TUNNEL_SEGMENTATION = ("tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation")


@pytest.mark.parametrize(
    ("off", "cut", "finished"),
    [
        pytest.param((), False, False, id="as it comes"),
        pytest.param(TUNNEL_SEGMENTATION, True, False, id="no tunnel segmentation"),
        pytest.param((*TUNNEL_SEGMENTATION, "tx-checksum-ip-generic"), True, True, id="no checksum either"),
    ],
)
def test_what_a_kernel_peer_sends_across_a_veth(
    namespace: Namespace, off: tuple[str, ...], cut: bool, finished: bool
) -> None:
    """A veth takes tunnel GSO, so a TCP superframe in VXLAN is never cut: one datagram far above the MTU,
    no UDP_GRO message though it was asked for, in any buffer smaller than 64 KiB lost. And it takes
    checksum offload, so inner TCP checksums are never finished, in short frames neither. Only with both
    off on the sender's side does what arrives look as it does behind a card."""
    here, there = namespace(), namespace()
    disable_ipv6(here)
    disable_ipv6(there)
    veth(here, there, (OURS[0], THEIRS[0]), 24)
    switch_off(there, "eth0", *off)
    add_vxlan(there)

    with (
        udp_socket(here, OURS[0], 4789) as tunnel,
        netns.open_socket(there, socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        tunnel.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        client.setblocking(False)
        assert client.connect_ex((OURS[1], 80)) != 0
        syn = Ether(tunnel.recv(1 << 16)[8:])
        tunnel.sendto(VXLAN_HEADER + bytes(answer(syn)), (THEIRS[0], 4789))
        assert tunnel.recv(1 << 16)  # its ACK
        assert client.send(bytes(SENT)) == SENT

        sizes, valid, merged, arrived = [], [], [], 0
        while arrived < SENT:
            datagram, control, _, _ = tunnel.recvmsg(1 << 16, socket.CMSG_SPACE(4))
            packet = datagram[8 + 14 :]
            arrived += len(IP(packet)[TCP].payload)
            sizes.append(len(packet))
            valid.append(transport_is_valid(packet))
            merged += control

    assert merged == []
    assert (max(sizes) <= 1450) is cut
    assert set(valid) == {finished}


def add_vxlan(there: Path) -> None:
    with netlink(there) as ip:
        settings = {"vxlan_id": VNI, "vxlan_port": 4789, "vxlan_local": THEIRS[0], "vxlan_group": OURS[0]}
        ip.link("add", ifname="vx", kind="vxlan", mtu=1450, vxlan_learning=0, **settings)
    set_up(there, "vx", THEIRS[1], 24)
    with netlink(there) as ip:
        index = link_index(ip, "vx")
        ip.neigh("add", dst=OURS[1], lladdr=OUR_MAC, ifindex=index, state=NUD_PERMANENT)


def answer(syn: Ether) -> Ether:
    """The SYN ACK that opens the connection, with room for what is sent then."""
    ours, theirs = syn[TCP].dport, syn[TCP].sport
    return (
        Ether(src=OUR_MAC, dst=syn.src)
        / IP(src=OURS[1], dst=THEIRS[1])
        / TCP(
            sport=ours,
            dport=theirs,
            flags="SA",
            seq=1,
            ack=syn.seq + 1,
            window=65535,
            options=[("MSS", 1410)],
        )
    )
