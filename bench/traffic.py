"""Packets to measure with, by shape. The same every time: nothing here is random.

A batch is what one call of the pump moves. Inner addresses are 10.1.0.0/16 and fd01::/32 towards 10.2.0.0/16
and fd02::/32.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address

from fastpath.wire.checksum import checksum

BATCH = 64
POD_MTU = 1450
JUMBO_MTU = 8950
SUPERFRAME_SEGMENTS = 44  # what one UDP_SEGMENT send carries at POD_MTU

ETHERTYPES = {4: 0x0800, 6: 0x86DD}
TCP, UDP = 6, 17
ACK = 0x10
TIMESTAMPS = struct.pack("!BBBBII", 1, 1, 8, 10, 0x01020304, 0x05060708)  # two NOPs, RFC 7323 section 3.2
TCP_HEADER = 20 + len(TIMESTAMPS)
IP_HEADER = {4: 20, 6: 40}

NEEDS_CHECKSUM = 1  # linux/virtio_net.h
GSO = {(TCP, 4): 1, (TCP, 6): 4, (UDP, 4): 5, (UDP, 6): 5}


def ends(flow: int, family: int) -> tuple[bytes, bytes]:
    """Inner source and destination of a flow's packets."""
    if family == 4:
        return bytes((10, 1, 0, 1 + flow)), bytes((10, 2, 0, 1 + flow))
    return tuple(ip_address(f"fd0{node}::{1 + flow:x}").packed for node in (1, 2))  # type: ignore[return-value]


def tcp(flow: int, number: int, payload: int, family: int = 4) -> bytes:
    """The flow's segment `number`, as the next that carries `payload` bytes."""
    header = struct.pack(
        "!HHIIBBHHH", 40000 + flow, 443, number * payload, 1, TCP_HEADER // 4 << 4, ACK, 512, 0, 0
    )
    return _ip(flow, TCP, header + TIMESTAMPS + _payload(payload), 16, number, family)


def udp(flow: int, number: int, payload: int, family: int = 4) -> bytes:
    header = struct.pack("!HHHH", 40000 + flow, 4433, 8 + payload, 0)
    return _ip(flow, UDP, header + _payload(payload), 6, number, family)


def _payload(length: int) -> bytes:
    return bytes(i * 7 & 0xFF for i in range(length))


def _ip(flow: int, protocol: int, segment: bytes, field: int, number: int, family: int) -> bytes:
    source, destination = ends(flow, family)
    pseudo = source + destination + struct.pack("!II", len(segment), protocol)
    total = checksum(pseudo + segment + b"\0" * (len(segment) % 2))
    segment = segment[:field] + struct.pack("!H", total) + segment[field + 2 :]
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, len(segment), protocol, 64) + source + destination + segment
    length = IP_HEADER[4] + len(segment)
    header = struct.pack("!BBHHHBBH", 0x45, 0, length, number & 0xFFFF, 0x4000, 64, protocol, 0)
    header += source + destination
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + segment


def full(number: int, flow: int = 0, family: int = 4, mtu: int = POD_MTU) -> bytes:
    return tcp(flow, number, mtu - IP_HEADER[family] - TCP_HEADER, family)


def one_flow() -> list[bytes]:
    return [full(i) for i in range(BATCH)]


def four_interleaved() -> list[bytes]:
    return [full(i // 4, flow=i % 4) for i in range(BATCH)]


def tiny() -> list[bytes]:
    """UDP with 22 bytes of payload, sixteen flows in runs of four: 64-byte frames."""
    return [udp(i // 4, i % 4, 22) for i in range(BATCH)]


def mixed() -> list[bytes]:
    """Seven small, four middling, one full (the "simple IMIX"), TCP and UDP, IPv4 and IPv6, eight flows."""
    sizes = (22, 22, 536, 22, 22, 536, 22, 536, 22, 22, 536, 1378)
    packets = []
    for i in range(BATCH):
        make = tcp if i % 3 else udp
        packets.append(make(i % 8, i // 8, sizes[i % len(sizes)], 6 if i % 8 in (2, 5) else 4))
    return packets


def jumbo() -> list[bytes]:
    """Sixteen, not 64: what a socket's buffer holds of them."""
    return [full(i, mtu=JUMBO_MTU) for i in range(BATCH // 4)]


SHAPES = {
    "one flow": one_flow,
    "four interleaved": four_interleaved,
    "tiny": tiny,
    "mixed": mixed,
    "jumbo": jumbo,
}


def frame(packet: bytes, destination: bytes, source: bytes) -> bytes:
    return destination + source + struct.pack("!H", ETHERTYPES[packet[0] >> 4]) + packet


def superframe(
    protocol: int, family: int, destination: bytes, source: bytes, mtu: int = POD_MTU
) -> tuple[bytes, bytes]:
    """(virtio_net_hdr, frame) of SUPERFRAME_SEGMENTS full segments, its checksum partial as a pod's is."""
    own = TCP_HEADER if protocol == TCP else 8
    size = mtu - IP_HEADER[family] - own
    make = tcp if protocol == TCP else udp
    packet = make(0, 0, size * SUPERFRAME_SEGMENTS, family)
    field = IP_HEADER[family] + (16 if protocol == TCP else 6)
    length = len(packet) - IP_HEADER[family]
    pseudo = b"".join(ends(0, family)) + struct.pack("!II", length, protocol)
    partial = ~checksum(pseudo) & 0xFFFF
    packet = packet[:field] + struct.pack("!H", partial) + packet[field + 2 :]
    start = 14 + IP_HEADER[family]
    header = struct.pack(
        "<BBHHHH", NEEDS_CHECKSUM, GSO[protocol, family], start + own, size, start, field - IP_HEADER[family]
    )
    return header, frame(packet, destination, source)
