"""What the pump must do with one frame (encap) or one datagram (decap): every check in its order."""

from __future__ import annotations

from dataclasses import dataclass

from tests.reference import checksum, classify, ecn, geneve, vxlan
from tests.reference.table import PrefixDict

LOCAL = 0


@dataclass(frozen=True)
class Peer:
    encapsulation: str
    vni: int
    router_mac: bytes
    mtu: int


@dataclass(frozen=True)
class Node:
    """What a node knows, in plain containers."""

    router_mac: bytes
    gateway_mac: bytes
    vni: int
    prefixes: PrefixDict
    peers: dict[int, Peer]
    sources: dict[bytes, int]
    vxlan_strict: bool = True


@dataclass(frozen=True)
class Dropped:
    reasons: frozenset[str]
    """One of these is counted; more than one only where a tunnel header has several faults at once."""


@dataclass(frozen=True)
class Sent:
    slot: int
    datagram: bytes
    ecn: int


def dropped(*reasons: str) -> Dropped:
    return Dropped(frozenset(reasons))


def encap(node: Node, virtio: bytes, frame: bytes) -> Sent | Dropped:
    """`virtio` is the frame's header of ten bytes or more, little endian."""
    if len(frame) < 14:
        return dropped("FRAME_SHORT")
    if frame[:6] != node.router_mac:
        return dropped("FRAME_NOT_FOR_ROUTER")
    fields = classify.classify(frame)
    if isinstance(fields, str):
        return dropped(fields)
    if node.prefixes.lookup(fields.source) != LOCAL:
        return dropped("INNER_SOURCE")
    slot = node.prefixes.lookup(fields.destination)
    if slot == LOCAL:
        return dropped("INNER_DESTINATION")
    if slot is None or slot not in node.peers:
        return dropped("NO_ROUTE")
    peer = node.peers[slot]
    if fields.packet_length > peer.mtu:
        return dropped("TOO_BIG")
    packet = _complete(virtio, frame[: 14 + fields.packet_length])
    if packet is None:
        return dropped("VIRTIO_HEADER")
    vni = peer.vni.to_bytes(3, "big") + b"\0"
    header = (b"\0\0\x65\x58" if peer.encapsulation == "geneve" else b"\x08\0\0\0") + vni
    ethernet = peer.router_mac + node.router_mac + frame[12:14]
    return Sent(slot, header + ethernet + packet, fields.tos & 3)


def _complete(virtio: bytes, frame: bytes) -> bytes | None:
    """The IP packet with its checksum finished as the header asks, or None where the two do not fit."""
    needs_checksum = virtio[0] & 1
    assert virtio[1] == 0, "superframes are not cut here"
    start = int.from_bytes(virtio[6:8], "little")
    field = start + int.from_bytes(virtio[8:10], "little")
    if not needs_checksum:
        return frame[14:]
    if start < 14 or field + 2 > len(frame):
        return None
    value = checksum.checksum(frame[start:])
    if value == 0 and field - start == 6:
        value = 0xFFFF  # UDP: zero would say that there is none
    return (frame[:field] + value.to_bytes(2, "big") + frame[field + 2 :])[14:]


def decap(node: Node, encapsulation: str, source: bytes, outer_ecn: int, datagram: bytes) -> bytes | Dropped:
    """The frame for the TAP, or why there is none."""
    slot = node.sources.get(source)
    if slot is None:
        return dropped("UNKNOWN_PEER")
    if encapsulation == "geneve":
        faults = geneve.faults(datagram)
        if faults:
            return dropped(*faults)
        vni, header = geneve.decode(datagram)
    else:
        fault = vxlan.fault(datagram, strict=node.vxlan_strict)
        if fault:
            return dropped(fault)
        vni, header = vxlan.decode(datagram)
    if vni != node.vni:
        return dropped("VNI_UNKNOWN")
    frame = datagram[header:]
    if len(frame) < 14:
        return dropped("FRAME_SHORT")
    if frame[:6] != node.router_mac:
        return dropped("FRAME_NOT_FOR_ROUTER")
    fields = classify.classify(frame)
    if isinstance(fields, str):
        return dropped(fields)
    if node.prefixes.lookup(fields.source) != slot:
        return dropped("INNER_SOURCE")
    if node.prefixes.lookup(fields.destination) != LOCAL:
        return dropped("INNER_DESTINATION")
    forwarded = ecn.DECAPSULATED[fields.tos & 3, outer_ecn]
    if forwarded is None:
        return dropped("ECN_CE_NOT_ECT")
    packet = with_ecn(frame[14 : 14 + fields.packet_length], forwarded)
    return node.gateway_mac + node.router_mac + frame[12:14] + packet


def with_ecn(packet: bytes, field: int) -> bytes:
    """The packet with another ECN field; a wrong IPv4 header checksum stays as wrong as it was."""
    if packet[0] >> 4 == 6:
        return packet[:1] + bytes([packet[1] & 0xCF | field << 4]) + packet[2:]
    old, new = packet[0:2], bytes([packet[0], packet[1] & 0xFC | field])
    if old == new:
        return packet
    complement = bytes(0xFF - byte for byte in packet[10:12] + old)
    value = checksum.checksum(complement + new)  # RFC 1624 equation 3
    return new + packet[2:10] + value.to_bytes(2, "big") + packet[12:]
