"""Packets for tests, slow and readable: scapy inside, plain bytes outside.

Addresses are written as people write them; the family follows from the address's form. What scapy would
refuse to get wrong (tunnel headers with lying lengths, half-finished checksums) is packed by hand.
"""

from __future__ import annotations

import struct
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, ETHERTYPE_QINQ = 0x0800, 0x86DD, 0x8100, 0x88A8

NEEDS_CHECKSUM = 1


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _ip(source: str, destination: str, *, tos: int, ttl: int, **fields: Any) -> Packet:
    if ":" in source:
        return IPv6(src=source, dst=destination, tc=tos, hlim=ttl, **fields)
    return IP(src=source, dst=destination, tos=tos, ttl=ttl, **fields)


def udp(
    source: str,
    destination: str,
    payload: bytes = b"payload",
    *,
    sport: int = 40_000,
    dport: int = 5_353,
    tos: int = 0,
    ttl: int = 64,
    **ip_fields: Any,
) -> bytes:
    """An IP packet with UDP inside, both checksums right."""
    headers = _ip(source, destination, tos=tos, ttl=ttl, **ip_fields) / UDP(sport=sport, dport=dport)
    return bytes(headers / Raw(payload))


def tcp(
    source: str,
    destination: str,
    payload: bytes = b"payload",
    *,
    sport: int = 40_000,
    dport: int = 443,
    tos: int = 0,
    ttl: int = 64,
    sequence: int = 1,
    **ip_fields: Any,
) -> bytes:
    """An IP packet with TCP inside, both checksums right."""
    segment = TCP(sport=sport, dport=dport, seq=sequence, flags="A")
    return bytes(_ip(source, destination, tos=tos, ttl=ttl, **ip_fields) / segment / Raw(payload))


def ping(source: str, destination: str, payload: bytes = b"payload", *, tos: int = 0, ttl: int = 64) -> bytes:
    """An ICMP or ICMPv6 echo request."""
    echo = ICMPv6EchoRequest(data=payload) if ":" in source else ICMP() / Raw(payload)
    return bytes(_ip(source, destination, tos=tos, ttl=ttl) / echo)


def fragments(source: str, destination: str, *, payload_length: int = 3_000, tos: int = 0) -> list[bytes]:
    """One UDP datagram cut into IP fragments of at most 1,400 bytes of data."""
    whole = udp(source, destination, bytes(range(256)) * (payload_length // 256 + 1), tos=tos)
    header, size = (40, 1_400) if ":" in source else (20, 1_400)
    data, cut = whole[header:], []
    for start in range(0, len(data), size):
        piece, more = data[start : start + size], start + size < len(data)
        if ":" in source:
            extension = IPv6ExtHdrFragment(nh=17, offset=start // 8, m=int(more), id=77)
            packet = _ip(source, destination, tos=tos, ttl=64) / extension / Raw(piece)
        else:
            flags = "MF" if more else 0
            packet = IP(
                src=source, dst=destination, tos=tos, proto=17, id=77, flags=flags, frag=start // 8
            ) / Raw(piece)
        cut.append(bytes(packet))
    return cut


def frame(
    packet: bytes, *, destination: bytes, source: bytes, ethertype: int | None = None, padding: bytes = b""
) -> bytes:
    """An Ethernet frame; the type follows the packet's version nibble unless it is given."""
    if ethertype is None:
        ethertype = ETHERTYPE_IPV4 if packet[0] >> 4 == 4 else ETHERTYPE_IPV6
    header = Ether(dst=destination.hex(":"), src=source.hex(":"), type=ethertype)
    return bytes(header) + packet + padding


def geneve(
    vni: int,
    *,
    version: int = 0,
    option_words: int | None = None,
    oam: bool = False,
    critical: bool = False,
    reserved_bits: int = 0,
    protocol: int = 0x6558,
    reserved_byte: int = 0,
    options: bytes = b"",
) -> bytes:
    """A Geneve header (RFC 8926 section 3.4); `option_words` may lie about the options that follow."""
    words = len(options) // 4 if option_words is None else option_words
    flags = oam << 7 | critical << 6 | reserved_bits
    return struct.pack("!BBHI", version << 6 | words, flags, protocol, vni << 8 | reserved_byte) + options


def geneve_option(
    data: bytes = b"",
    *,
    option_class: int = 0x0102,
    kind: int = 0x01,
    words: int | None = None,
    reserved: int = 0,
) -> bytes:
    """One Geneve option (RFC 8926 section 3.5); `words` may lie about its data."""
    length = len(data) // 4 if words is None else words
    return struct.pack("!HBB", option_class, kind, reserved << 5 | length) + data


def vxlan(vni: int, *, flags: int = 0x08, reserved: bytes = b"\0\0\0", reserved_byte: int = 0) -> bytes:
    """A VXLAN header (RFC 7348 section 5)."""
    return bytes([flags]) + reserved + struct.pack("!I", vni << 8 | reserved_byte)


def virtio(
    *,
    size: int,
    flags: int = 0,
    gso_type: int = 0,
    header_length: int = 0,
    gso_size: int = 0,
    checksum_start: int = 0,
    checksum_offset: int = 0,
) -> bytes:
    """A virtio_net_hdr of `size` bytes (10, or more with zeroes behind) in little-endian order."""
    fields = (flags, gso_type, header_length, gso_size, checksum_start, checksum_offset)
    return struct.pack("<BBHHHH", *fields).ljust(size, b"\0")


def leave_checksum_partial(packet: bytes) -> tuple[bytes, int, int]:
    """(packet, checksum start from the IP header, offset) as a sender with checksum offload leaves it.

    The field of TCP or UDP then holds the folded sum of the pseudo-header, not complemented.
    """
    is_ipv4 = packet[0] >> 4 == 4
    start = (packet[0] & 15) * 4 if is_ipv4 else 40
    protocol = packet[9] if is_ipv4 else packet[6]
    addresses = packet[12:20] if is_ipv4 else packet[8:40]
    offset = {6: 16, 17: 6}[protocol]
    words = addresses + struct.pack("!HH", protocol, len(packet) - start)
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    at = start + offset
    return packet[:at] + total.to_bytes(2, "big") + packet[at + 2 :], start, offset
