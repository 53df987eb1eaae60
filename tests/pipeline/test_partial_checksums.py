"""Inner checksums left to the receiver's host: between nodes that agreed on it, and from nobody else."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest

from fastpath.offload import virtio
from fastpath.wire import geneve
from tests.packets import build
from tests.pipeline.harness import POD_MTU, VNI, Node, Wire, pod, router_mac, wire_address

MakeNode = Callable[..., Node]
MakeWire = Callable[[str], Wire]

MARKED = geneve.encode(VNI, partial_checksum=True)
PLAIN = geneve.encode(VNI)


def agree(node: Node, other: int, port: int) -> None:
    """Make node `other` slot 1, and let checksums be partial both ways."""
    node.add_peer(1, other, port)
    node.peers.set(
        1,
        encapsulation="geneve",
        vni=VNI,
        router_mac=router_mac(other),
        endpoint=ip_address(wire_address(other, node.family)).packed,
        port=port,
        mtu=POD_MTU,
        partial_checksums=True,
    )


def message(kind: str, inner: int) -> bytes:
    build_packet = build.tcp if kind == "tcp" else build.udp
    return build_packet(pod(1, inner), pod(2, inner))


def send_partial(node: Node, packet: bytes) -> bytes:
    """Let a pod send the packet with its checksum unfinished; the packet as it was then."""
    partial, start, offset = build.leave_checksum_partial(packet)
    node.pods_send(
        node.frame(partial), node.virtio(flags=1, checksum_start=14 + start, checksum_offset=offset)
    )
    node.pump.encap()
    return partial


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_partial_checksum_crosses_as_such(make_node: MakeNode, inner: int, kind: str) -> None:
    one, two = make_node(1, 4), make_node(2, 4)
    agree(one, 2, two.port("geneve"))
    agree(two, 1, one.port("geneve"))
    partial = send_partial(one, message(kind, inner))
    two.decap("geneve")
    arrived = two.tap.recv(1 << 16)
    asked = virtio.decode(arrived[: two.vnet_header_size])
    assert arrived[two.vnet_header_size + 14 :] == partial
    transport = 14 + (20 if inner == 4 else 40)
    assert asked == (1, 0, 0, 0, transport, 16 if kind == "tcp" else 6)
    one.assert_counters_close()
    two.assert_counters_close()


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_only_an_unfinished_checksum_gets_the_option(
    make_node: MakeNode, make_wire: MakeWire, inner: int, kind: str
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    agree(node, 2, wire.port)
    packet = message(kind, inner)
    node.pods_send(node.frame(packet))
    node.pump.encap()
    (datagram,) = wire.get()
    assert (datagram.payload[:8], datagram.payload[8 + 14 :]) == (PLAIN, packet)
    partial = send_partial(node, packet)
    (datagram,) = wire.get()
    assert (datagram.payload[:12], datagram.payload[12 + 14 :]) == (MARKED, partial)


def test_a_peer_without_the_agreement_gets_finished_checksums(
    make_node: MakeNode, make_wire: MakeWire, inner: int
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    packet = message("tcp", inner)
    send_partial(node, packet)
    (datagram,) = wire.get()
    assert (datagram.payload[:8], datagram.payload[8 + 14 :]) == (PLAIN, packet)


def from_peer(node: Node, packet: bytes, header: bytes) -> bytes:
    return header + build.frame(packet, destination=router_mac(node.number), source=router_mac(2))


def test_the_option_without_an_agreement_is_an_unknown_critical_one(
    make_node: MakeNode, make_wire: MakeWire
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    node.add_peer(1, 2, wire.port)
    packet = build.tcp(pod(2, 4), pod(1, 4))
    wire.send(from_peer(node, packet, MARKED), node.address, node.port("geneve"))
    node.decap("geneve")
    assert node.dropped("decap") == {"tunnel_critical_option": 1}
    assert node.pods_get() == []


def test_the_option_on_a_packet_without_a_checksum_is_refused(
    make_node: MakeNode, make_wire: MakeWire
) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    agree(node, 2, wire.port)
    wire.send(from_peer(node, build.ping(pod(2, 4), pod(1, 4)), MARKED), node.address, node.port("geneve"))
    node.decap("geneve")
    assert node.dropped("decap") == {"tunnel_options": 1}
    assert node.pods_get() == []


def test_another_critical_option_beside_it_is_still_refused(make_node: MakeNode, make_wire: MakeWire) -> None:
    node, wire = make_node(1, 4), make_wire(wire_address(2, 4))
    agree(node, 2, wire.port)
    header = bytearray(MARKED + bytes([0xFF, 0x71, 0x82, 0]))
    header[0] = 2
    wire.send(
        from_peer(node, build.tcp(pod(2, 4), pod(1, 4)), bytes(header)), node.address, node.port("geneve")
    )
    node.decap("geneve")
    assert node.dropped("decap") == {"tunnel_critical_option": 1}


def test_vxlan_has_no_way_to_say_it(make_node: MakeNode) -> None:
    with pytest.raises(ValueError, match="only Geneve"):
        make_node(1, 4).peers.set(
            1,
            encapsulation="vxlan",
            vni=VNI,
            router_mac=router_mac(2),
            endpoint=bytes(4),
            port=1,
            mtu=POD_MTU,
            partial_checksums=True,
        )
