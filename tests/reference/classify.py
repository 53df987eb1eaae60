"""What a frame is, read field by field as RFC 791 and RFC 8200 draw them."""

from __future__ import annotations

from typing import NamedTuple

TCP, UDP, FRAGMENT, SCTP = 6, 17, 44, 132


class Fields(NamedTuple):
    family: int
    packet_length: int
    header_length: int
    protocol: int
    tos: int
    is_fragment: bool
    source: bytes
    destination: bytes
    ports: bytes
    """The first four bytes of TCP, UDP or SCTP; empty for fragments, other protocols and cut headers."""

    @property
    def flow(self) -> tuple[bytes, bytes, int, bytes]:
        return self.source, self.destination, self.protocol, self.ports


def classify(frame: bytes) -> Fields | str:
    """The fields, or the drop reason by name."""
    if len(frame) < 14:
        return "FRAME_SHORT"
    ethertype, packet = int.from_bytes(frame[12:14], "big"), frame[14:]
    if ethertype in (0x8100, 0x88A8):
        return "FRAME_VLAN"
    if ethertype == 0x0800:
        return _ipv4(packet)
    if ethertype == 0x86DD:
        return _ipv6(packet)
    return "FRAME_NOT_IP"


def _ipv4(packet: bytes) -> Fields | str:
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return "IP_MALFORMED"
    header_length = (packet[0] & 15) * 4
    packet_length = int.from_bytes(packet[2:4], "big")
    if header_length < 20 or packet_length < header_length or packet_length > len(packet):
        return "IP_MALFORMED"
    if packet[8] == 0:
        return "IP_TTL_EXPIRED"
    more_fragments = packet[6] & 0x20 != 0
    offset = int.from_bytes(packet[6:8], "big") & 0x1FFF
    is_fragment = more_fragments or offset != 0
    return Fields(
        family=4,
        packet_length=packet_length,
        header_length=header_length,
        protocol=packet[9],
        tos=packet[1],
        is_fragment=is_fragment,
        source=packet[12:16],
        destination=packet[16:20],
        ports=b"" if is_fragment else _ports(packet[9], packet[header_length:packet_length]),
    )


def _ipv6(packet: bytes) -> Fields | str:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return "IP_MALFORMED"
    packet_length = 40 + int.from_bytes(packet[4:6], "big")
    if packet_length > len(packet):
        return "IP_MALFORMED"
    if packet[7] == 0:
        return "IP_TTL_EXPIRED"
    is_fragment = packet[6] == FRAGMENT
    return Fields(
        family=6,
        packet_length=packet_length,
        header_length=40,
        protocol=packet[6],
        tos=(packet[0] & 15) << 4 | packet[1] >> 4,
        is_fragment=is_fragment,
        source=packet[8:24],
        destination=packet[24:40],
        ports=b"" if is_fragment else _ports(packet[6], packet[40:packet_length]),
    )


def _ports(protocol: int, segment: bytes) -> bytes:
    return segment[:4] if protocol in (TCP, UDP, SCTP) and len(segment) >= 4 else b""
