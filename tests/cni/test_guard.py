"""What a pod cannot send: each frame against the program alone, then from real pods past a real bridge."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from scapy.all import (
    ARP,
    BOOTP,
    DHCP,
    ICMP,
    IP,
    LLC,
    STP,
    TCP,
    UDP,
    Dot1Q,
    Ether,
    ICMPv6EchoRequest,
    ICMPv6MLQuery,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    Raw,
)

from cni import bpf, guard, netns
from tests.cni.conftest import Namespaces, Node, sh

pytestmark = pytest.mark.root

MAC, GATEWAY_MAC, OTHER_MAC = "02:00:00:00:00:05", "02:00:00:00:00:01", "02:00:00:00:00:06"
OWN, OWN6, OTHER, OTHER6 = "10.71.0.2", "fd71::2", "10.71.0.3", "fd71::3"
GATEWAY, GATEWAY6 = "10.71.0.1", "fd71::1"
LINK_LOCAL = "fe80::ff:fe00:5"  # of MAC
NODE, NODE6 = "192.0.2.7", "2001:db8::7"
TUNNEL_PORTS = (6081, 4789, 8472)
N = 50
_PROG_DETACH = 9  # linux/bpf.h

POD = guard.Allowance(
    MAC,
    (ip_address(OWN), ip_address(OWN6)),
    (ip_network("10.71.0.0/17"), ip_network("fd71::/44")),
    TUNNEL_PORTS,
)


def frames(mac: str, gateway_mac: str, link_local: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(honest, spoofed) frames of the pod with OWN, OWN6 and these MACs, by what they are."""
    link = Ether(src=mac, dst=gateway_mac)
    v4, v6 = link / IP(src=OWN, dst=NODE), link / IPv6(src=OWN6, dst=NODE6)
    payload = Raw(b"podloom" * 4)
    target_own = ICMPv6ND_NA(tgt=OWN6, R=0) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    honest = {
        "TCP": v4 / TCP(dport=80),
        "UDP": v4 / UDP(dport=53) / payload,
        "UDP 6": v6 / UDP(dport=53) / payload,
        "ping": v4 / ICMP(),
        "ping 6": v6 / ICMPv6EchoRequest(),
        "ping 6 from fe80": link / IPv6(src=link_local, dst=GATEWAY6) / ICMPv6EchoRequest(),
        "IPv4 options": link / IP(src=OWN, dst=NODE, options=[]) / TCP(),
        "later fragment": link / IP(src=OWN, dst=NODE, frag=100, proto=17) / payload,
        "later fragment 6": v6 / IPv6ExtHdrFragment(offset=100, nh=58) / payload,
        "ARP request": link / ARP(op=1, hwsrc=mac, psrc=OWN, pdst=GATEWAY),
        "ARP reply": link / ARP(op=2, hwsrc=mac, psrc=OWN, pdst=GATEWAY, hwdst=gateway_mac),
        "solicitation": v6 / ICMPv6ND_NS(tgt=GATEWAY6) / ICMPv6NDOptSrcLLAddr(lladdr=mac),
        "solicitation, no option": v6 / ICMPv6ND_NS(tgt=GATEWAY6),
        "address detection": link / IPv6(src="::", dst="ff02::1:ff00:2") / ICMPv6ND_NS(tgt=OWN6),
        "advertisement": v6 / target_own,
        "router solicitation": link / IPv6(src=link_local, dst="ff02::2") / ICMPv6ND_RS(),
        "MLD report": link
        / IPv6(src="::", dst="ff02::16")
        / IPv6ExtHdrHopByHop()
        / ICMPv6MLReport2(records=[]),
        **{
            f"a pod's own tunnel {port}": link / IP(src=OWN, dst=OTHER) / UDP(dport=port)
            for port in TUNNEL_PORTS
        },
        "a pod's own tunnel 6": link / IPv6(src=OWN6, dst=OTHER6) / UDP(dport=6081),
    }
    other_source = ARP(op=2, hwsrc=mac, psrc=GATEWAY, pdst=OTHER)
    ra, redirect = ICMPv6ND_RA(), ICMPv6ND_Redirect(tgt=OTHER6, dst=NODE6)
    from_fe80 = link / IPv6(src=link_local, dst="ff02::1")
    spoofed = {
        "other MAC": Ether(src=OTHER_MAC, dst=gateway_mac) / IP(src=OWN, dst=NODE) / TCP(),
        "gateway's MAC": Ether(src=gateway_mac, dst=gateway_mac) / IP(src=OWN, dst=NODE) / TCP(),
        "other IPv4": link / IP(src=OTHER, dst=NODE) / TCP(),
        "gateway's IPv4": link / IP(src=GATEWAY, dst=NODE) / UDP(),
        "no IPv4": link / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(),
        "other IPv6": link / IPv6(src=OTHER6, dst=NODE6) / TCP(),
        "other fe80": link / IPv6(src="fe80::1", dst="ff02::1") / ICMPv6EchoRequest(),
        "no IPv6": link / IPv6(src="::", dst=NODE6) / UDP(),
        "other, fragmented": link / IP(src=OTHER, dst=NODE, frag=100) / payload,
        "ARP as gateway": link / other_source,
        "ARP with other MAC": link / ARP(op=2, hwsrc=OTHER_MAC, psrc=OWN, pdst=GATEWAY),
        "ARP probe": link / ARP(op=1, hwsrc=mac, psrc="0.0.0.0", pdst=GATEWAY),
        "ARP broadcast as gateway": Ether(src=mac, dst="ff:ff:ff:ff:ff:ff") / other_source,
        "RA": from_fe80 / ra,
        "RA behind options": from_fe80 / IPv6ExtHdrDestOpt() / ra,
        "RA behind five headers": from_fe80
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / ra,
        "RA behind eight headers": from_fe80
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrDestOpt()
        / ra,
        "RA in a first fragment": from_fe80 / IPv6ExtHdrFragment(offset=0, m=1) / ra,
        "RA as own address": v6 / ra,
        "NA for the gateway": v6 / ICMPv6ND_NA(tgt=GATEWAY6) / ICMPv6NDOptDstLLAddr(lladdr=mac),
        "NA for another pod": v6 / ICMPv6ND_NA(tgt=OTHER6) / ICMPv6NDOptDstLLAddr(lladdr=mac),
        "NA with other MAC": v6 / ICMPv6ND_NA(tgt=OWN6) / ICMPv6NDOptDstLLAddr(lladdr=OTHER_MAC),
        "NA with two options": v6 / target_own / ICMPv6NDOptDstLLAddr(lladdr=OTHER_MAC),
        "NS with other MAC": v6 / ICMPv6ND_NS(tgt=GATEWAY6) / ICMPv6NDOptSrcLLAddr(lladdr=OTHER_MAC),
        "address detection of another's": link / IPv6(src="::", dst="ff02::1") / ICMPv6ND_NS(tgt=GATEWAY6),
        "redirect 6": from_fe80 / redirect,
        "redirect": v4 / ICMP(type=5, code=1, gw=OTHER),
        "router advertisement 4": v4 / ICMP(type=9),
        "MLD query": from_fe80 / ICMPv6MLQuery(),
        "DHCP offer": v4 / UDP(sport=67, dport=68) / BOOTP(op=2) / DHCP(options=[("message-type", "offer")]),
        "DHCPv6 advertise": v6 / UDP(sport=547, dport=546) / Raw(b"\x02abc"),
        "802.1Q": Ether(src=mac, dst=gateway_mac) / Dot1Q(vlan=5) / IP(src=OWN, dst=NODE) / TCP(),
        "802.1Q twice": link / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IP(src=OWN, dst=NODE) / TCP(),
        "802.1Q, VLAN 0": link / Dot1Q(vlan=0) / IP(src=OTHER, dst=NODE) / TCP(),
        "STP": Ether(src=mac, dst="01:80:c2:00:00:00", type=38) / LLC() / STP(),
        "LLDP": Ether(src=mac, dst="01:80:c2:00:00:0e", type=0x88CC) / Raw(b"\x02\x07\x04" + bytes(30)),
        "MPLS": Ether(src=mac, dst=gateway_mac, type=0x8847) / Raw(bytes(40)),
        **{f"tunnel {port} to a node": v4 / UDP(dport=port) / payload for port in TUNNEL_PORTS},
        **{f"tunnel {port} to a node 6": v6 / UDP(dport=port) / payload for port in TUNNEL_PORTS},
        "tunnel behind options": v6 / IPv6ExtHdrDestOpt() / UDP(dport=6081) / payload,
        "tunnel in a first fragment": link / IP(src=OWN, dst=NODE, flags="MF") / UDP(dport=6081) / payload,
        "tunnel, IPv4 options": link / IP(src=OWN, dst=NODE, options=[b"\x01" * 4]) / UDP(dport=6081),
    }
    return honest, spoofed


HONEST, SPOOFED = frames(MAC, GATEWAY_MAC, LINK_LOCAL)


@pytest.fixture(scope="module")
def program() -> Iterator[int]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it loads an eBPF program")
    fd = bpf.load(guard.program(POD))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_frame_passes(program: int, kind: str) -> None:
    assert bpf.run(program, bytes(HONEST[kind])) == guard.ACCEPT


@pytest.mark.parametrize("kind", SPOOFED)
def test_a_spoofed_frame_is_dropped(program: int, kind: str) -> None:
    assert bpf.run(program, bytes(SPOOFED[kind])) == guard.DROP


def shortest(frame: bytes) -> int:
    """The kernel tests no program on less than an IP header."""
    return {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}.get(frame[12:14], 15)


def test_a_frame_cut_short_is_never_worse(program: int) -> None:
    """Cut anywhere, what was spoofed stays dropped; what was honest needs the headers that are looked at."""
    for frame in map(bytes, SPOOFED.values()):
        for size in range(shortest(frame), len(frame)):
            # An ND message can lose the option that was wrong: then it says nothing of a MAC.
            if bpf.run(program, frame[:size]) == guard.ACCEPT:
                assert frame[12:14] == b"\x86\xdd"
                assert size == 78 or (size, frame[80:86]) == (86, bytes.fromhex(MAC.replace(":", "")))
    for kind, needed in {"UDP": 34 + 4, "UDP 6": 54 + 4, "ping": 34 + 1, "ARP request": 42}.items():
        frame = bytes(HONEST[kind])
        answers = {bpf.run(program, frame[:size]) for size in range(shortest(frame), needed)}
        assert answers == {guard.DROP}, kind


def test_a_family_the_pod_does_not_have(program: int) -> None:
    four = bpf.load(guard.program(guard.Allowance(MAC, (ip_address(OWN),), POD.cluster_cidrs, TUNNEL_PORTS)))
    try:
        assert bpf.run(four, bytes(HONEST["UDP"])) == guard.ACCEPT
        for kind in ("UDP 6", "ping 6 from fe80", "address detection"):
            assert bpf.run(four, bytes(HONEST[kind])) == guard.DROP
    finally:
        os.close(four)


# --- real pods


class Wire:
    """Sends frames from one pod's eth0 and counts those that get past the node's bridge."""

    def __init__(self, sender: str, *listeners: tuple[str, str]) -> None:
        self._undo = ExitStack()
        self._sender = self._socket(sender, "eth0", protocol=0)
        self._listeners = [self._socket(namespace, link) for namespace, link in listeners]

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _socket(self, namespace: str, link: str, protocol: int = 3) -> socket.socket:
        def opened() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
            made.bind((link, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            return made

        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            return self._undo.enter_context(netns.call_in(fd, opened))
        finally:
            os.close(fd)

    def delivered(self, frame: bytes, last: bytes) -> int:
        """How many of N such frames were seen by any listener; `last` is an honest one that ends the wait."""
        for _ in range(N):
            self._sender.send(frame)
        self._sender.send(last)
        seen, until = 0, time.monotonic() + 5
        while (left := until - time.monotonic()) > 0:
            for ready in select.select(self._listeners, [], [], left)[0]:
                data = ready.recv(2048)
                seen += data == frame
                if data == last:
                    return seen
        raise AssertionError("the honest frame did not arrive")


def test_spoofed_frames_stop_at_the_pods_own_port(
    node: Node, namespaces: Namespaces, record_property: Any
) -> None:
    """0 of N of each kind reach the host or another pod; all N where the check is switched off."""
    sender, victim = namespaces.new(), namespaces.new()
    added = node.call("ADD", sender, node.conf(runtimeConfig={"mac": MAC}))
    node.call("ADD", victim)
    assert [ip["address"] for ip in added.body["ips"]] == [f"{OWN}/32", f"{OWN6}/128"]
    gateway_mac = node.links()["loom0"]["address"]
    honest, spoofed = frames(MAC, gateway_mac, LINK_LOCAL)
    last = bytes(Ether(src=MAC, dst=gateway_mac) / IP(src=OWN, dst=NODE) / UDP(sport=9) / b"the last one")
    before = sh("ip", "-n", node.name, "-6", "route"), sh("ip", "-n", victim, "neigh")
    with Wire(sender, (node.name, "loom0"), (victim, "eth0")) as wire:
        arrived = {kind: wire.delivered(bytes(frame), last) for kind, frame in spoofed.items()}
        passed = {kind: wire.delivered(bytes(frame), last) for kind, frame in honest.items()}
    assert arrived == dict.fromkeys(spoofed, 0)
    assert passed == dict.fromkeys(honest, N)
    assert (sh("ip", "-n", node.name, "-6", "route"), sh("ip", "-n", victim, "neigh")) == before
    record_property("spoofed frames delivered", f"0 of {N} for each of {len(spoofed)} kinds")


def test_switched_off_only_by_the_configuration(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    conf = node.conf(spoofCheck=False, runtimeConfig={"mac": MAC})
    added = node.call("ADD", pod, conf)
    assert node.call("CHECK", pod, conf | {"prevResult": added.body}).exit == 0
    guarded = node.call("CHECK", pod, node.conf(prevResult=added.body))
    assert guarded.body["code"] == 102
    assert "anti-spoofing" in guarded.body["msg"]
    gateway_mac = node.links()["loom0"]["address"]
    _, spoofed = frames(MAC, gateway_mac, LINK_LOCAL)
    last = bytes(Ether(src=MAC, dst=gateway_mac) / IP(src=OWN, dst=NODE) / UDP(sport=9) / b"the last one")
    with Wire(pod, (node.name, "loom0")) as wire:
        for kind in ("other IPv4", "ARP as gateway", "tunnel 6081 to a node"):
            assert wire.delivered(bytes(spoofed[kind]), last) == N


def test_check_finds_the_guard_gone(node: Node, namespaces: Namespaces) -> None:
    """Whoever is root on the node can detach it, and a pod without it is not as it was made."""
    pod = namespaces.new()
    added = node.call("ADD", pod)
    port = node.links()[added.body["interfaces"][0]["name"]]["ifindex"]
    conf = node.conf(prevResult=added.body)
    assert node.call("CHECK", pod, conf).exit == 0
    fd = os.open(f"/run/netns/{node.name}", os.O_RDONLY)
    try:
        detach = struct.pack("=IIII", port, 0, bpf._TCX_INGRESS, 0)
        netns.call_in(fd, bpf._bpf, _PROG_DETACH, detach, "detach the last program")
    finally:
        os.close(fd)
    failed = node.call("CHECK", pod, conf)
    assert (failed.body["code"], "anti-spoofing" in failed.body["msg"]) == (102, True)


def test_a_dhcp_client_asks_without_an_address_and_nobody_else(program: int) -> None:
    """The dhcp plugin renews so. Nothing else passes by that way."""
    client = bpf.load(guard.program(replace(POD, dhcp_client=True)))
    link, ask = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff"), IP(src="0.0.0.0", dst="255.255.255.255")
    request = UDP(sport=68, dport=67) / BOOTP(op=1) / DHCP(options=[("message-type", "request")])
    bad = {
        "another's MAC": Ether(src=OTHER_MAC, dst="ff:ff:ff:ff:ff:ff") / ask / request,
        "to one host": link / IP(src="0.0.0.0", dst=NODE) / request,
        "another port": link / ask / UDP(sport=68, dport=6081) / Raw(bytes(40)),
        "a server's": link / ask / UDP(sport=67, dport=68) / Raw(bytes(40)),
        "TCP": link / ask / TCP(sport=68, dport=67),
        "options": link / IP(src="0.0.0.0", dst="255.255.255.255", options=[b"\x01" * 4]) / request,
        "a fragment": link / IP(src="0.0.0.0", dst="255.255.255.255", flags="MF") / request,
    }
    try:
        assert bpf.run(client, bytes(link / ask / request)) == guard.ACCEPT
        assert bpf.run(program, bytes(link / ask / request)) == guard.DROP
        for kind, frame in {**SPOOFED, **bad}.items():
            assert bpf.run(client, bytes(frame)) == guard.DROP, kind
        for kind, frame in HONEST.items():
            assert bpf.run(client, bytes(frame)) == guard.ACCEPT, kind
    finally:
        os.close(client)


def test_kernels_before_tcx(node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program as a filter of a clsact qdisc; CHECK finds it, and finds it gone."""
    pod = namespaces.new()
    monkeypatch.setattr(bpf, "attach_tcx", lambda *_: False)
    added = node.call("ADD", pod, node.conf(runtimeConfig={"mac": MAC}))
    conf = node.conf(prevResult=added.body)
    assert node.call("CHECK", pod, conf).exit == 0
    gateway_mac = node.links()["loom0"]["address"]
    _, spoofed = frames(MAC, gateway_mac, LINK_LOCAL)
    last = bytes(Ether(src=MAC, dst=gateway_mac) / IP(src=OWN, dst=NODE) / UDP(sport=9) / b"the last one")
    with Wire(pod, (node.name, "loom0")) as wire:
        for kind in ("other IPv4", "ARP as gateway", "RA", "tunnel 6081 to a node"):
            assert wire.delivered(bytes(spoofed[kind]), last) == 0
    port = added.body["interfaces"][0]["name"]
    sh("ip", "netns", "exec", node.name, "tc", "qdisc", "del", "dev", port, "clsact")
    assert node.call("CHECK", pod, conf).body["code"] == 102


def test_a_kernel_without_ebpf_is_an_error_until_told_otherwise(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: bytes) -> int:
        raise bpf.BpfError(38, "load: Function not implemented")

    monkeypatch.setattr(bpf, "load", refuse)
    refused = node.call("ADD", namespaces.new())
    assert refused.body["code"] == 100
    assert "spoofCheck" in refused.body["msg"]
    assert node.held() == []
    status = node.handle({"CNI_COMMAND": "STATUS"}, '{"cniVersion": "1.1.0", "name": "podnet"}')
    assert '"code":50' in status[1]
    assert node.call("ADD", namespaces.new(), node.conf(spoofCheck=False)).exit == 0


def test_an_ordinary_pods_own_traffic_passes(node: Node, namespaces: Namespaces) -> None:
    """What its kernel sends by itself, MAC of its own, both families, and fragments."""
    pod = namespaces.new()
    assert node.call("ADD", pod).exit == 0
    fd = os.open(f"/run/netns/{pod}", os.O_RDONLY)
    try:
        for family, target in ((socket.AF_INET, GATEWAY), (socket.AF_INET6, GATEWAY6)):
            with netns.call_in(fd, socket.socket, family, socket.SOCK_DGRAM) as sender:
                sender.settimeout(5)
                sender.connect((target, 9))
                sender.send(bytes(4000))
                with pytest.raises(ConnectionRefusedError):  # the whole datagram came, and the host answered
                    sender.recv(1)
    finally:
        os.close(fd)
