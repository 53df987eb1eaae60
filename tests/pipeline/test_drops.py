"""Every drop reason is reached by a named case, counted once, in its direction, and nothing is forwarded.

A case is one frame (encap) or one datagram (decap) against node 1, whose peer in slot 1 is node 2.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from fastpath.drops import DropReason
from fastpath.table import LOCAL_SLOT
from tests.packets import build
from tests.pipeline.harness import (
    ENCAPSULATIONS,
    POD_MTU,
    VNI,
    Node,
    Wire,
    gateway_mac,
    pod,
    router_mac,
    wait_readable,
    wire_address,
)

MakeNode = Callable[..., Node]
MakeWire = Callable[[str], Wire]

TO_ROUTER_1 = {"destination": router_mac(1), "source": gateway_mac(1)}
FROM_PEER_2 = {"destination": router_mac(1), "source": router_mac(2)}


def patched(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


# encap: one frame from the pods ---------------------------------------------------------------------


@dataclass(frozen=True)
class EncapCase:
    name: str
    reason: DropReason
    frame: bytes
    virtio: dict[str, int] = field(default_factory=dict)


OUT4 = build.udp(pod(1, 4), pod(2, 4))
OUT6 = build.udp(pod(1, 6), pod(2, 6))


def from_pods(packet: bytes, **options: int | bytes) -> bytes:
    return build.frame(packet, **(TO_ROUTER_1 | options))  # type: ignore[arg-type]


ENCAP_CASES = [
    EncapCase("a lone virtio header", DropReason.FRAME_SHORT, b""),
    EncapCase("13 bytes", DropReason.FRAME_SHORT, from_pods(OUT4)[:13]),
    EncapCase(
        "to another MAC",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(OUT4, destination=router_mac(9), source=gateway_mac(1)),
    ),
    EncapCase(
        "broadcast",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(OUT4, destination=b"\xff" * 6, source=gateway_mac(1)),
    ),
    EncapCase(
        "multicast",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(OUT6, destination=build.mac("33:33:00:00:00:01"), source=gateway_mac(1)),
    ),
    EncapCase("802.1Q tag", DropReason.FRAME_VLAN, from_pods(OUT4, ethertype=build.ETHERTYPE_VLAN)),
    EncapCase("802.1ad tag", DropReason.FRAME_VLAN, from_pods(OUT4, ethertype=build.ETHERTYPE_QINQ)),
    EncapCase("ARP", DropReason.FRAME_NOT_IP, from_pods(bytes(46), ethertype=0x0806)),
    EncapCase("no packet", DropReason.IP_MALFORMED, from_pods(OUT4)[:14]),
    EncapCase("a cut IPv4 packet", DropReason.IP_MALFORMED, from_pods(OUT4)[:-1]),
    EncapCase("a cut IPv6 packet", DropReason.IP_MALFORMED, from_pods(OUT6)[:-1]),
    EncapCase("IPv6 under IPv4's type", DropReason.IP_MALFORMED, from_pods(OUT6, ethertype=0x0800)),
    EncapCase("TTL 0", DropReason.IP_TTL_EXPIRED, from_pods(build.udp(pod(1, 4), pod(2, 4), ttl=0))),
    EncapCase("hop limit 0", DropReason.IP_TTL_EXPIRED, from_pods(build.udp(pod(1, 6), pod(2, 6), ttl=0))),
    EncapCase(
        "a source outside the cluster",
        DropReason.INNER_SOURCE,
        from_pods(build.udp("198.51.100.1", pod(2, 4))),
    ),
    EncapCase(
        "a source of another node", DropReason.INNER_SOURCE, from_pods(build.udp(pod(3, 4), pod(2, 4)))
    ),
    EncapCase("the peer's own source", DropReason.INNER_SOURCE, from_pods(build.udp(pod(2, 6), pod(2, 6)))),
    EncapCase(
        "a destination on this node",
        DropReason.INNER_DESTINATION,
        from_pods(build.udp(pod(1, 4), pod(1, 4, 9))),
    ),
    EncapCase(
        "a destination on this node, IPv6",
        DropReason.INNER_DESTINATION,
        from_pods(build.udp(pod(1, 6), pod(1, 6, 9))),
    ),
    EncapCase("a prefix nobody has", DropReason.NO_ROUTE, from_pods(build.udp(pod(1, 4), "10.250.0.1"))),
    EncapCase(
        "a prefix nobody has, IPv6", DropReason.NO_ROUTE, from_pods(build.udp(pod(1, 6), "fd00:fa::1"))
    ),
    EncapCase("multicast inside", DropReason.NO_ROUTE, from_pods(build.udp(pod(1, 4), "224.0.0.251"))),
    EncapCase(
        "one byte over the peer's MTU",
        DropReason.TOO_BIG,
        from_pods(build.udp(pod(1, 4), pod(2, 4), bytes(POD_MTU - 28 + 1))),
    ),
    EncapCase(
        "one byte over the peer's MTU, IPv6",
        DropReason.TOO_BIG,
        from_pods(build.udp(pod(1, 6), pod(2, 6), bytes(POD_MTU - 48 + 1))),
    ),
    EncapCase(
        "a checksum behind the packet",
        DropReason.VIRTIO_HEADER,
        from_pods(OUT4),
        {"flags": 1, "checksum_start": 34, "checksum_offset": len(OUT4)},
    ),
    EncapCase(
        "a checksum in the padding",
        DropReason.VIRTIO_HEADER,
        from_pods(OUT4, padding=bytes(20)),
        {"flags": 1, "checksum_start": 14 + len(OUT4), "checksum_offset": 6},
    ),
    EncapCase(
        "a checksum from inside the Ethernet header",
        DropReason.VIRTIO_HEADER,
        from_pods(OUT4),
        {"flags": 1, "checksum_start": 0, "checksum_offset": 16},
    ),
    EncapCase(
        "a superframe nobody asked for",
        DropReason.VIRTIO_HEADER,
        from_pods(OUT4),
        {"flags": 1, "gso_type": 1, "gso_size": 1_000, "checksum_start": 34, "checksum_offset": 16},
    ),
]


@pytest.mark.parametrize("case", ENCAP_CASES, ids=lambda case: f"{case.reason.name}: {case.name}")
def test_encap(node: Node, wire: Wire, encapsulation: str, case: EncapCase) -> None:
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    node.insert("10.3.0.0/24", 1)
    node.pods_send(case.frame, node.virtio(**case.virtio))
    assert node.pump.encap() == 1
    assert_dropped_once(node, "encap", case.reason)
    assert wire.get_now() == []


def assert_dropped_once(node: Node, direction: str, reason: DropReason) -> None:
    """Counted under its reason in its direction, under no other, and nothing came out anywhere."""
    assert node.dropped(direction) == {reason.name.lower(): 1}
    other = {"encap": "decap", "decap": "encap"}[direction]
    assert (node.received(direction), node.forwarded(direction)) == (1, 0)
    assert (node.received(other), node.forwarded(other), node.dropped(other)) == (0, 0, {})
    assert node.pump.counters()[direction]["forwarded_bytes"] == 0
    assert node.pods_get() == []
    assert not any(node.peers.counters(1).values())
    node.assert_counters_close()


# decap: one datagram from the wire ------------------------------------------------------------------


@dataclass(frozen=True)
class DecapCase:
    name: str
    reason: DropReason
    frame: bytes
    """What lies behind a good tunnel header of either encapsulation."""
    vni: int = VNI
    tos: int = 0


IN4 = build.udp(pod(2, 4), pod(1, 4))
IN6 = build.udp(pod(2, 6), pod(1, 6))


def from_peer(packet: bytes, **options: int | bytes) -> bytes:
    return build.frame(packet, **(FROM_PEER_2 | options))  # type: ignore[arg-type]


DECAP_CASES = [
    DecapCase("the VNI one bit off", DropReason.VNI_UNKNOWN, from_peer(IN4), vni=VNI ^ 1),
    DecapCase("the next VNI", DropReason.VNI_UNKNOWN, from_peer(IN4), vni=VNI + 1),
    DecapCase("VNI 0", DropReason.VNI_UNKNOWN, from_peer(IN4), vni=0),
    DecapCase("the largest VNI", DropReason.VNI_UNKNOWN, from_peer(IN4), vni=0xFFFFFF),
    DecapCase("no frame", DropReason.FRAME_SHORT, b""),
    DecapCase("13 bytes of frame", DropReason.FRAME_SHORT, from_peer(IN4)[:13]),
    DecapCase(
        "to another MAC",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(IN4, destination=router_mac(9), source=router_mac(2)),
    ),
    DecapCase(
        "our own frame come back",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(OUT4, destination=router_mac(2), source=router_mac(1)),
    ),
    DecapCase(
        "broadcast",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(IN4, destination=b"\xff" * 6, source=router_mac(2)),
    ),
    DecapCase(
        "to the gateway instead of the router",
        DropReason.FRAME_NOT_FOR_ROUTER,
        build.frame(IN4, destination=gateway_mac(1), source=router_mac(2)),
    ),
    DecapCase("802.1Q tag", DropReason.FRAME_VLAN, from_peer(IN4, ethertype=build.ETHERTYPE_VLAN)),
    DecapCase("802.1ad tag", DropReason.FRAME_VLAN, from_peer(IN4, ethertype=build.ETHERTYPE_QINQ)),
    DecapCase("ARP", DropReason.FRAME_NOT_IP, from_peer(bytes(46), ethertype=0x0806)),
    DecapCase("no packet", DropReason.IP_MALFORMED, from_peer(IN4)[:14]),
    DecapCase("a cut IPv4 packet", DropReason.IP_MALFORMED, from_peer(IN4)[:-1]),
    DecapCase("a cut IPv6 packet", DropReason.IP_MALFORMED, from_peer(IN6)[:-1]),
    DecapCase("IHL 4", DropReason.IP_MALFORMED, from_peer(patched(IN4, 0, b"\x44"))),
    DecapCase("IPv4 under IPv6's type", DropReason.IP_MALFORMED, from_peer(IN4, ethertype=0x86DD)),
    DecapCase("TTL 0", DropReason.IP_TTL_EXPIRED, from_peer(build.udp(pod(2, 4), pod(1, 4), ttl=0))),
    DecapCase("hop limit 0", DropReason.IP_TTL_EXPIRED, from_peer(build.udp(pod(2, 6), pod(1, 6), ttl=0))),
    DecapCase(
        "a source of a third node", DropReason.INNER_SOURCE, from_peer(build.udp(pod(3, 4), pod(1, 4)))
    ),
    DecapCase("a source of ours", DropReason.INNER_SOURCE, from_peer(build.udp(pod(1, 4, 9), pod(1, 4)))),
    DecapCase(
        "a source outside the cluster",
        DropReason.INNER_SOURCE,
        from_peer(build.udp("198.51.100.1", pod(1, 4))),
    ),
    DecapCase(
        "a source outside the cluster, IPv6",
        DropReason.INNER_SOURCE,
        from_peer(build.udp("2001:db8::1", pod(1, 6))),
    ),
    DecapCase(
        "a destination of a third node",
        DropReason.INNER_DESTINATION,
        from_peer(build.udp(pod(2, 4), pod(3, 4))),
    ),
    DecapCase(
        "a destination of the sender's",
        DropReason.INNER_DESTINATION,
        from_peer(build.udp(pod(2, 6), pod(2, 6, 9))),
    ),
    DecapCase(
        "a destination outside the cluster",
        DropReason.INNER_DESTINATION,
        from_peer(build.udp(pod(2, 4), "198.51.100.1")),
    ),
    DecapCase(
        "multicast inside", DropReason.INNER_DESTINATION, from_peer(build.udp(pod(2, 4), "224.0.0.251"))
    ),
    DecapCase("CE around Not-ECT", DropReason.ECN_CE_NOT_ECT, from_peer(IN4), tos=3),
    DecapCase("CE around Not-ECT, IPv6", DropReason.ECN_CE_NOT_ECT, from_peer(IN6), tos=3),
]


@pytest.mark.parametrize("case", DECAP_CASES, ids=lambda case: f"{case.reason.name}: {case.name}")
def test_decap(node: Node, wire: Wire, encapsulation: str, case: DecapCase) -> None:
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    node.insert("10.3.0.0/24", 3)
    header = build.geneve(case.vni) if encapsulation == "geneve" else build.vxlan(case.vni)
    wire.send(header + case.frame, node.address, node.port(encapsulation), case.tos)
    node.decap(encapsulation)
    assert_dropped_once(node, "decap", case.reason)


# decap: tunnel headers, whose cases in full are the codecs' own -----------------------------------------

CRITICAL = build.geneve_option(b"\0" * 4, kind=0x80)

TUNNEL_CASES = [
    ("geneve", DropReason.TUNNEL_SHORT, "an empty datagram", b""),
    ("geneve", DropReason.TUNNEL_SHORT, "seven bytes", build.geneve(VNI)[:7]),
    ("vxlan", DropReason.TUNNEL_SHORT, "an empty datagram", b""),
    ("vxlan", DropReason.TUNNEL_SHORT, "seven bytes", build.vxlan(VNI)[:7]),
    ("geneve", DropReason.TUNNEL_VERSION, "version 1", build.geneve(VNI, version=1) + from_peer(IN4)),
    ("geneve", DropReason.TUNNEL_OAM, "a control packet", build.geneve(VNI, oam=True) + from_peer(IN4)),
    (
        "geneve",
        DropReason.TUNNEL_PROTOCOL,
        "an IP packet without Ethernet",
        build.geneve(VNI, protocol=0x0800) + IN4,
    ),
    (
        "geneve",
        DropReason.TUNNEL_OPTIONS,
        "an option that runs over",
        build.geneve(VNI, options=build.geneve_option(words=1)) + from_peer(IN4),
    ),
    (
        "geneve",
        DropReason.TUNNEL_CRITICAL_OPTION,
        "a critical option",
        build.geneve(VNI, critical=True, options=CRITICAL) + from_peer(IN4),
    ),
    ("vxlan", DropReason.TUNNEL_FLAGS, "I clear", build.vxlan(VNI, flags=0) + from_peer(IN4)),
    ("vxlan", DropReason.TUNNEL_FLAGS, "a reserved bit", build.vxlan(VNI, flags=0x88) + from_peer(IN4)),
    ("vxlan", DropReason.TUNNEL_FLAGS, "Geneve on VXLAN's port", build.geneve(VNI) + from_peer(IN4)),
    (
        "geneve",
        DropReason.TUNNEL_PROTOCOL,
        "VXLAN on Geneve's port",
        build.vxlan(VNI, flags=0) + from_peer(IN4),
    ),
]


@pytest.mark.parametrize(
    ("encapsulation", "reason", "name", "datagram"),
    TUNNEL_CASES,
    ids=[f"{kind} {reason.name}: {name}" for kind, reason, name, _ in TUNNEL_CASES],
)
def test_tunnel_header(
    node: Node, wire: Wire, encapsulation: str, reason: DropReason, name: str, datagram: bytes
) -> None:
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    wire.send(datagram, node.address, node.port(encapsulation))
    node.decap(encapsulation)
    assert_dropped_once(node, "decap", reason)


@pytest.mark.parametrize("packet", [IN4, IN6], ids=["IPv4 inside", "IPv6 inside"])
def test_a_valid_datagram_cut_at_every_byte(
    node: Node, wire: Wire, encapsulation: str, packet: bytes
) -> None:
    node.add_peer(1, 2, wire.port, encapsulation=encapsulation)
    header = build.geneve(VNI) if encapsulation == "geneve" else build.vxlan(VNI)
    whole = header + from_peer(packet)
    for length in range(len(whole)):
        wire.send(whole[:length], node.address, node.port(encapsulation))
        node.decap(encapsulation)
    assert node.dropped("decap") == {
        "tunnel_short": 8,
        "frame_short": 14,
        "ip_malformed": len(packet),
    }
    assert node.pods_get() == []
    node.assert_counters_close()
    wire.send(whole, node.address, node.port(encapsulation))
    node.decap(encapsulation)
    assert len(node.pods_get()) == 1


# What takes more than one packet to reach ----------------------------------------------------------------


def a_good_datagram(packet: bytes = IN4) -> bytes:
    return build.geneve(VNI) + from_peer(packet)


def unknown_peer(node: Node, wire: Wire, opened: ExitStack) -> None:
    """Nobody is allowed to send from the wire's address."""
    node.add_peer(1, 2, wire.port)
    node.peers.forget_source(socket.inet_pton(socket.AF_INET, wire_address(2, 4)))
    wire.send(a_good_datagram(), node.address, node.port("geneve"))
    node.decap("geneve")


def unknown_peer_from_our_own_address(node: Node, wire: Wire, opened: ExitStack) -> None:
    """W5: our own datagram come back to us."""
    node.add_peer(1, 2, node.port("geneve"), address=node.address)
    node.peers.forget_source(socket.inet_pton(socket.AF_INET, node.address))
    node.pods_send(node.frame(OUT4))
    node.pump.encap()
    node.decap("geneve")


def outer_oversize(node: Node, wire: Wire, opened: ExitStack) -> None:
    """UDP has no datagram longer than the buffer; a unix socket in its place has."""
    node.add_peer(1, 2, wire.port)
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    opened.enter_context(far)
    opened.enter_context(near)
    near.setblocking(False)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    node.pump.add_receiver(near.fileno(), "geneve")
    far.send(a_good_datagram().ljust(65_537, b"\0"))
    assert node.pump.decap(near.fileno()) == 1


def no_sender_of_the_family(node: Node, wire: Wire, opened: ExitStack) -> None:
    node.add_peer(1, 2, wire.port, address="::1")
    node.pods_send(node.frame(OUT4))
    node.pump.encap()


def refused_by_the_kernel(node: Node, wire: Wire, opened: ExitStack) -> None:
    """Sending to a broadcast address without SO_BROADCAST is EACCES."""
    node.add_peer(1, 2, wire.port, address="127.255.255.255")
    node.pods_send(node.frame(OUT4))
    node.pump.encap()


def longer_than_a_datagram(node: Node, wire: Wire, opened: ExitStack) -> None:
    """Within the peer's MTU as configured, yet EMSGSIZE from the kernel."""
    node.add_peer(1, 2, wire.port, mtu=65_535)
    node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4), bytes(65_507 - 22 - 28 + 1))))
    node.pump.encap()


def socket_is_full(node: Node, wire: Wire, opened: ExitStack) -> None:
    """A seqpacket socket ignores the address it is told to send to, and, unlike loopback, fills up."""
    full, _far = (
        opened.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    )
    full.setblocking(False)
    fill(full)
    node.pump.add_sender(full.fileno(), socket.AF_INET6)
    node.add_peer(1, 2, wire.port, address="::1")
    node.pods_send(node.frame(OUT4))
    node.pump.encap()


def fill(sock: socket.socket) -> None:
    for size in (4_096, 1):
        while True:
            try:
                sock.send(bytes(size))
            except BlockingIOError:
                break


def tap_is_full(node: Node, wire: Wire, opened: ExitStack) -> None:
    node.add_peer(1, 2, wire.port)
    fill(node.pump_tap)
    wire.send(a_good_datagram(), node.address, node.port("geneve"))
    node.decap("geneve")


def tap_is_gone(node: Node, wire: Wire, opened: ExitStack) -> None:
    node.add_peer(1, 2, wire.port)
    node.tap.close()
    wire.send(a_good_datagram(), node.address, node.port("geneve"))
    node.decap("geneve")


def nobody_takes_the_probes(node: Node, wire: Wire, opened: ExitStack) -> None:
    """As many as wait at most, and one more; they are no packets."""
    node.add_peer(1, 2, wire.port)
    probe = build.frame(b"pl\x01".ljust(64, b"\0"), **FROM_PEER_2, ethertype=0x88B5)
    for _ in range(512 + 1):
        wire.send(build.geneve(VNI, oam=True) + probe, node.address, node.port("geneve"))
        wait_readable(node.receivers["geneve"])
        assert node.pump.decap(node.receivers["geneve"]) == 1


def neither_finished_nor_partial(node: Node, wire: Wire, opened: ExitStack) -> None:
    """A superframe goes to the TAP as one, its checksum vouched for: a wrong one must not be laundered."""
    node.add_peer(1, 2, wire.port)
    packet = build.tcp(pod(2, 4), pod(1, 4), bytes(4_000))
    wire.send(a_good_datagram(packet[:-1] + b"X"), node.address, node.port("geneve"))
    node.decap("geneve")


STAGED = [
    ("decap", DropReason.INNER_CHECKSUM, neither_finished_nor_partial),
    ("decap", DropReason.PROBES_FULL, nobody_takes_the_probes),
    ("decap", DropReason.UNKNOWN_PEER, unknown_peer),
    ("decap", DropReason.OUTER_OVERSIZE, outer_oversize),
    ("decap", DropReason.TAP_FULL, tap_is_full),
    ("decap", DropReason.TAP_ERROR, tap_is_gone),
    ("encap", DropReason.UDP_ERROR, no_sender_of_the_family),
    ("encap", DropReason.UDP_ERROR, refused_by_the_kernel),
    ("encap", DropReason.UDP_FULL, socket_is_full),
    ("encap", DropReason.TOO_BIG, longer_than_a_datagram),
]


@pytest.mark.parametrize(
    ("direction", "reason", "stage"),
    STAGED,
    ids=[f"{reason.name}: {stage.__name__}" for _, reason, stage in STAGED],
)
def test_staged(
    make_node: MakeNode,
    make_wire: MakeWire,
    opened: ExitStack,
    direction: str,
    reason: DropReason,
    stage: Callable[[Node, Wire, ExitStack], None],
) -> None:
    node, wire = make_node(1, 4, mtu=POD_MTU), make_wire(wire_address(2, 4))
    stage(node, wire, opened)
    assert node.dropped(direction) == {reason.name.lower(): 1}
    assert (node.received(direction), node.forwarded(direction)) == (1, 0)
    assert not any(node.peers.counters(1).values())
    assert wire.get_now() == []
    if reason not in (DropReason.TAP_FULL, DropReason.TAP_ERROR):
        assert node.pods_get() == []
    node.assert_counters_close()


def test_our_own_datagram_come_back_is_from_no_peer(
    make_node: MakeNode, make_wire: MakeWire, opened: ExitStack
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    unknown_peer_from_our_own_address(node, wire, opened)
    assert node.forwarded("encap") == 1
    assert node.dropped("decap") == {"unknown_peer": 1}
    assert node.pods_get() == []


def test_every_reason_is_reached() -> None:
    reached = {case.reason for case in ENCAP_CASES} | {case.reason for case in DECAP_CASES}
    reached |= {reason for _, reason, _, _ in TUNNEL_CASES} | {reason for _, reason, _ in STAGED}
    assert reached == set(DropReason)


def test_tunnel_cases_name_both_encapsulations() -> None:
    assert {kind for kind, *_ in TUNNEL_CASES} == set(ENCAPSULATIONS)


# Around the reasons -------------------------------------------------------------------------------------


def test_a_full_socket_counts_each_datagram_of_its_run(
    make_node: MakeNode, make_wire: MakeWire, opened: ExitStack
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    full, _far = (
        opened.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    )
    full.setblocking(False)
    fill(full)
    node.pump.add_sender(full.fileno(), socket.AF_INET6)
    node.add_peer(1, 2, wire.port, address="::1")
    for _ in range(50):
        node.pods_send(node.frame(OUT4))
    assert node.pump.encap() == 50
    assert node.dropped("encap") == {"udp_full": 50}
    node.assert_counters_close()


def test_a_train_from_a_stranger_counts_each_of_its_datagrams(
    make_node: MakeNode, make_wire: MakeWire, encapsulation: str
) -> None:
    node, stranger = make_node(1, 4), make_wire(wire_address(9, 4))
    segment = [(socket.IPPROTO_UDP, 103, (100).to_bytes(2, "little"))]  # UDP_SEGMENT
    stranger.socket.sendmsg([bytes(1_250)], segment, 0, (node.address, node.port(encapsulation)))
    node.decap(encapsulation, 13)
    assert node.dropped("decap") == {"unknown_peer": 13}
    assert node.received("decap") == 13


def test_one_bad_peer_does_not_lose_the_others_datagrams(make_node: MakeNode, make_wire: MakeWire) -> None:
    node, wire = make_node(1, 4, senders=1), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    node.add_peer(2, 3, wire.port, address="127.255.255.255")  # EACCES
    for at in range(30):
        node.pods_send(node.frame(build.udp(pod(1, 4), pod(3 if at % 3 == 1 else 2, 4), bytes([at]))))
    assert node.pump.encap() == 30
    assert [datagram.payload[-1] for datagram in wire.get(20)] == [at for at in range(30) if at % 3 != 1]
    assert node.dropped("encap") == {"udp_error": 10}
    assert node.peers.counters(1)["encap_packets"] == 20
    node.assert_counters_close()


def test_a_full_tap_delivers_again_once_it_is_read(make_node: MakeNode, make_wire: MakeWire) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    tap_is_full(node, wire, ExitStack())
    while True:
        try:
            node.tap.recv(1 << 16)
        except BlockingIOError:
            break
    wire.send(a_good_datagram(), node.address, node.port("geneve"))
    node.decap("geneve")
    assert len(node.pods_get()) == 1
    assert node.dropped("decap") == {"tap_full": 1}


def test_a_cleared_peer_is_unknown_and_has_no_route(make_node: MakeNode, make_wire: MakeWire) -> None:
    """Between the clearing of a peer and the removal of its prefixes its packets go nowhere, quietly."""
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    node.peers.clear(1)
    wire.send(a_good_datagram(), node.address, node.port("geneve"))
    node.decap("geneve")
    node.pods_send(node.frame(OUT4))
    node.pump.encap()
    assert node.dropped("decap") == {"unknown_peer": 1}
    assert node.dropped("encap") == {"no_route": 1}


# The slot's number is beyond what the peer table has room for: reading it would be reading foreign memory.
UNFILLED_SLOT = """
from tests.packets import build
from tests.pipeline.harness import Node, pod
node = Node(1, 4)
node.insert("10.2.0.0/24", {slot})
for filled in range({peers}):
    node.add_peer(1 + filled, 3 + filled, 9)
node.pods_send(node.frame(build.udp(pod(1, 4), pod(2, 4))))
assert node.pump.encap() == 1
assert node.dropped("encap") == {{"no_route": 1}}, node.dropped("encap")
node.close()
"""


@pytest.mark.parametrize("peers", [0, 1, 20], ids=["an empty table", "one peer", "twenty peers"])
@pytest.mark.parametrize("slot", [30, 65_535])
def test_a_prefix_whose_slot_was_never_filled_has_no_route(slot: int, peers: int) -> None:
    """In a process of its own: the fault this pins was a crash."""
    script = UNFILLED_SLOT.format(slot=slot, peers=peers)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr or f"killed by signal {-run.returncode}"


def test_a_local_prefix_is_never_a_route(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    node.insert("0.0.0.0/0", LOCAL_SLOT)
    node.pods_send(node.frame(OUT4))
    node.pump.encap()
    assert node.dropped("encap") == {"inner_destination": 1}


def test_reading_a_tap_that_failed_is_an_error_not_a_drop(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    node.pump_tap.close()
    with pytest.raises(OSError, match="TAP"):
        node.pump.encap()
    assert node.received("encap") == 0


def test_a_pod_that_hangs_up_is_no_frame(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    node.tap.close()
    assert node.pump.encap() == 0
    assert node.received("encap") == 0


def test_a_wire_that_failed_is_an_error_not_a_drop(make_node: MakeNode) -> None:
    node = make_node(1, 4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        fd = closed.fileno()
        node.pump.add_receiver(fd, "geneve")
    with pytest.raises(OSError, match="datagrams"):
        node.pump.decap(fd)
    assert node.received("decap") == 0


def test_two_drops_of_one_reason_are_two(make_node: MakeNode, make_wire: MakeWire) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    for _ in range(2):
        wire.send(b"", node.address, node.port("geneve"))
        wait_readable(node.receivers["geneve"])
        node.decap("geneve")
    assert node.dropped("decap") == {"tunnel_short": 2}
