"""Cutting a superframe: what net/ipv4/tcp_offload.c, udp_offload.c and linux/virtio_net.h ask, a rule a line.

Each segment is made of its parts, and its checksums are summed anew from beginning to end.
"""

from __future__ import annotations

import struct

from tests.reference import checksum, classify

NEEDS_CSUM = 1
TCPV4, TCPV6, UDP_L4, ECN = 1, 4, 5, 0x80
LONGEST_HEADERS = 192  # Ethernet, IP and transport: IPv4 needs 134, IPv6 without extensions 114
REFUSED = "VIRTIO_HEADER"


def cut(virtio: bytes, frame: bytes) -> list[bytes] | str:
    """The segments as frames, or the drop reason by name."""
    fields = classify.classify(frame)
    if isinstance(fields, str):
        return fields
    flags, gso_type, _, size, start, offset = struct.unpack("<BBHHHH", virtio[:10])
    kind, end = gso_type & ~ECN, 14 + fields.packet_length
    tcp = kind != UDP_L4
    if not flags & NEEDS_CSUM or size == 0 or fields.is_fragment:
        return REFUSED
    if (kind, fields.family) not in {(TCPV4, 4), (TCPV6, 6), (UDP_L4, 4), (UDP_L4, 6)}:
        return REFUSED
    network_end = 14 + fields.header_length
    if start < network_end or (start > network_end and fields.family == 4):
        return REFUSED
    if start == network_end and fields.protocol != (classify.TCP if tcp else classify.UDP):
        return REFUSED  # behind IPv6 extension headers, which are not walked, it is taken on trust
    if offset != (16 if tcp else 6):
        return REFUSED
    transport = frame[start:end]
    if len(transport) < (20 if tcp else 8):
        return REFUSED
    own = (transport[12] >> 4) * 4 if tcp else 8
    if own < (20 if tcp else 8) or own >= len(transport) or start + own > LONGEST_HEADERS:
        return REFUSED
    payload = transport[own:]
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    segments = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        header = (
            _tcp(transport[:own], number * size, number == 0, last) if tcp else _udp(transport[:8], piece)
        )
        network = _network(frame[14:start], number, own + len(piece))
        whole = _with_checksum(fields, header + piece, tcp)
        segments.append(frame[:14] + network + whole)
    return segments


def _tcp(header: bytes, advance: int, first: bool, last: bool) -> bytes:
    sequence = int.from_bytes(header[4:8], "big") + advance & 0xFFFFFFFF
    flags = header[13]
    if not first:
        flags &= ~0x80  # CWR says something once
    if not last:
        flags &= ~(0x01 | 0x08)  # FIN and PSH say something of the end
    return header[:4] + sequence.to_bytes(4, "big") + header[8:13] + bytes([flags]) + header[14:]


def _udp(header: bytes, payload: bytes) -> bytes:
    return header[:4] + (8 + len(payload)).to_bytes(2, "big") + header[6:]


def _network(header: bytes, number: int, transport_length: int) -> bytes:
    """The IP header, with what stands between it and the transport header."""
    if header[0] >> 4 == 6:
        return header[:4] + (len(header) - 40 + transport_length).to_bytes(2, "big") + header[6:]
    identification = int.from_bytes(header[4:6], "big") + number & 0xFFFF
    total = struct.pack("!HH", len(header) + transport_length, identification)
    unsummed = header[:2] + total + header[6:10] + b"\0\0" + header[12:]
    return unsummed[:10] + checksum.checksum(unsummed).to_bytes(2, "big") + unsummed[12:]


def _with_checksum(fields: classify.Fields, segment: bytes, tcp: bool) -> bytes:
    at = 16 if tcp else 6
    protocol = classify.TCP if tcp else classify.UDP
    pseudo = checksum.pseudo_header(fields.source, fields.destination, protocol, len(segment))
    value = checksum.checksum(pseudo + segment[:at] + b"\0\0" + segment[at + 2 :])
    if value == 0 and not tcp:
        value = 0xFFFF  # RFC 768: zero would say that there is none
    return segment[:at] + value.to_bytes(2, "big") + segment[at + 2 :]
