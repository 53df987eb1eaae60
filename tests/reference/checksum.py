"""The Internet checksum by the text of RFC 1071, section 1: add, fold, complement."""

from __future__ import annotations


def add(data: bytes, initial: int = 0) -> int:
    """The one's complement sum of big-endian 16-bit words; an odd last byte is padded with zero."""
    total = initial
    for index, byte in enumerate(data):
        total += byte << 8 if index % 2 == 0 else byte
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes, initial: int = 0) -> int:
    return 0xFFFF - add(data, initial)


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """RFC 9293 section 3.1 for IPv4, RFC 8200 section 8.1 for IPv6."""
    if len(source) == 4:
        return source + destination + bytes([0, protocol]) + length.to_bytes(2, "big")
    return source + destination + length.to_bytes(4, "big") + bytes([0, 0, 0, protocol])


def transport_is_valid(packet: bytes) -> bool:
    """Whether the TCP, UDP or ICMPv6 checksum of an unfragmented IP packet without extensions verifies."""
    if packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        source, destination, protocol = packet[12:16], packet[16:20], packet[9]
    else:
        header, source, destination, protocol = 40, packet[8:24], packet[24:40], packet[6]
    segment = packet[header:]
    if protocol == 17 and segment[6:8] == b"\0\0":
        return False  # "no checksum": nothing verifies it
    return add(pseudo_header(source, destination, protocol, len(segment)) + segment) == 0xFFFF


def ipv4_header_is_valid(packet: bytes) -> bool:
    return add(packet[: (packet[0] & 15) * 4]) == 0xFFFF
