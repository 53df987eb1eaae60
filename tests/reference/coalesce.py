"""Merging packets to superframes: every rule a line, every superframe made anew from what its packets say.

A packet may be appended to the newest chain of its flow if that loses nothing: cutting the chain again must
give back each packet (but for the IPv4 ID of packets that may not be fragmented, which means nothing).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from tests.reference import checksum, classify
from tests.reference.classify import TCP, UDP

NEEDS_CSUM = 1
GSO_NONE, TCPV4, TCPV6, UDP_L4 = 0, 1, 4, 5
PSH, ACK, ECE = 0x08, 0x10, 0x40

CHAINS = 128
CHAIN_PACKETS = 64
CHAIN_BYTES = 65_535

# RFC 8200 section 4.1: behind these the ports are somewhere, and are not looked for.
EXTENSION_HEADERS = {0, 43, 44, 60}


@dataclass(frozen=True)
class Packet:
    ethernet: bytes
    fields: classify.Fields
    network: bytes
    """The IP header."""
    transport: bytes
    """Everything behind it."""

    @property
    def own(self) -> int:
        """Bytes of TCP or UDP header."""
        return (self.transport[12] >> 4) * 4 if self.fields.protocol == TCP else 8

    @property
    def payload(self) -> bytes:
        return self.transport[self.own :]

    @property
    def sequence(self) -> int:
        return int.from_bytes(self.transport[4:8], "big")

    @property
    def flags(self) -> int:
        return self.transport[13] if self.fields.protocol == TCP else 0

    @property
    def identification(self) -> int:
        return int.from_bytes(self.network[4:6], "big")

    @property
    def hides_its_ports(self) -> bool:
        """It may be of any flow between its addresses."""
        extended = self.fields.family == 6 and self.fields.protocol in EXTENSION_HEADERS
        return self.fields.is_fragment or extended

    @property
    def checksum_is_right(self) -> bool:
        return checksum.transport_is_valid(self.network + self.transport)

    @property
    def checksum_is_partial(self) -> bool:
        """The field is the pseudo-header's sum, as a sender leaves it to its hardware."""
        offset = {TCP: 16, UDP: 6}.get(self.fields.protocol)
        if offset is None or self.fields.is_fragment or len(self.transport) < (20 if offset == 16 else 8):
            return False
        if offset == 6 and not _udp_length_is_right(self):
            return False
        field = int.from_bytes(self.transport[offset : offset + 2], "big")
        if field == 0 and offset == 6:
            return False
        return field == checksum.add(_pseudo_header(self, len(self.transport))) and not self.checksum_is_right


Chain = list[Packet]


def merge(frames: Iterable[bytes], *, tcp: bool = True, udp: bool = True) -> list[tuple[bytes, bytes]]:
    """(virtio_net_hdr, frame) in the order in which each began."""
    mergeable = {TCP: tcp, UDP: udp}
    written: list[tuple[bytes, bytes]] = []
    chains: list[Chain] = []
    for frame in frames:
        packet = read(frame)
        chain = _newest_chain(chains, packet)
        if chain is not None and mergeable[packet.fields.protocol] and _joins(chain, packet):
            chain.append(packet)
            continue
        if len(chains) == CHAINS:
            written += map(_write, chains)
            chains = []
        chains.append([packet])
    return written + [_write(chain) for chain in chains]


def read(frame: bytes) -> Packet:
    """A frame that classify() takes."""
    fields = classify.classify(frame)
    assert isinstance(fields, classify.Fields), fields
    packet = frame[14 : 14 + fields.packet_length]  # what is behind it is Ethernet padding
    return Packet(frame[:14], fields, packet[: fields.header_length], packet[fields.header_length :])


def _newest_chain(chains: list[Chain], packet: Packet) -> Chain | None:
    """The newest of the packet's flow, unless a packet in between may be of that flow as well."""
    if packet.fields.protocol not in (TCP, UDP):
        return None
    for chain in reversed(chains):
        if chain[0].fields.flow == packet.fields.flow:
            return chain
        ends = packet.fields.source, packet.fields.destination
        if chain[0].hides_its_ports and (chain[0].fields.source, chain[0].fields.destination) == ends:
            return None
    return None


def _joins(chain: Chain, packet: Packet) -> bool:
    return (
        all(_may_be_in_a_chain(member) for member in (*chain, packet))
        and _same_network(chain, packet)
        and (packet.fields.protocol == UDP or _continues_the_stream(chain, packet))
        and len(packet.payload) <= len(chain[0].payload)
        and len(chain[-1].payload) == len(chain[0].payload)  # a shorter one was the last
        and len(chain) < CHAIN_PACKETS
        and _length([*chain, packet]) <= CHAIN_BYTES
    )


def _may_be_in_a_chain(packet: Packet) -> bool:
    fields, transport = packet.fields, packet.transport
    if fields.is_fragment or fields.header_length != (20 if fields.family == 4 else 40):
        return False
    if fields.family == 4 and not checksum.ipv4_header_is_valid(packet.network):
        return False  # cutting would write a right one
    if fields.protocol == TCP:
        if len(transport) < 20 or packet.own < 20 or packet.own >= len(transport):
            return False
        if packet.flags & ~(PSH | ECE) != ACK:
            return False
    elif len(transport) <= 8 or not _udp_length_is_right(packet) or transport[6:8] == b"\0\0":
        return False
    # A superframe's checksum is trusted, so each member's must have been right.
    return packet.checksum_is_right or packet.checksum_is_partial


def _same_network(chain: Chain, packet: Packet) -> bool:
    first, now = chain[0].network, packet.network
    if packet.fields.family == 6:
        return first[:4] == now[:4] and first[7] == now[7]  # class, flow label, hop limit
    same = first[1] == now[1] and first[8] == now[8] and first[6] == now[6]  # ToS, TTL, DF
    may_be_fragmented = not now[6] & 0x40
    counts_upwards = packet.identification == (chain[0].identification + len(chain)) & 0xFFFF
    return same and (counts_upwards or not may_be_fragmented)


def _continues_the_stream(chain: Chain, packet: Packet) -> bool:
    last, first = chain[-1], chain[0]
    return (
        packet.sequence == (last.sequence + len(last.payload)) & 0xFFFFFFFF
        and packet.own == first.own
        and not last.flags & PSH
        and packet.flags & ECE == first.flags & ECE
        and packet.transport[8:13] == first.transport[8:13]  # acknowledgement, reserved bits
        and packet.transport[14:16] == first.transport[14:16]  # window
        and packet.transport[18 : packet.own] == first.transport[18 : first.own]  # urgent pointer, options
    )


def _udp_length_is_right(packet: Packet) -> bool:
    return int.from_bytes(packet.transport[4:6], "big") == len(packet.transport)


def _length(chain: Chain) -> int:
    return len(chain[0].network) + chain[0].own + sum(len(packet.payload) for packet in chain)


def _write(chain: Chain) -> tuple[bytes, bytes]:
    first = chain[0]
    start = 14 + len(first.network)
    offset = 6 if first.fields.protocol == UDP else 16
    if len(chain) == 1:
        asks = (NEEDS_CSUM, GSO_NONE, 0, 0, start, offset) if first.checksum_is_partial else (0,) * 6
        return struct.pack("<BBHHHH", *asks), first.ethernet + first.network + first.transport
    kind = UDP_L4 if offset == 6 else TCPV4 if first.fields.family == 4 else TCPV6
    virtio = struct.pack("<BBHHHH", NEEDS_CSUM, kind, start + first.own, len(first.payload), start, offset)
    data = b"".join(packet.payload for packet in chain)
    return virtio, first.ethernet + _network(first, _length(chain)) + _transport(chain, len(data)) + data


def _network(first: Packet, length: int) -> bytes:
    header = first.network
    if first.fields.family == 6:
        return header[:4] + (length - 40).to_bytes(2, "big") + header[6:]
    unsummed = header[:2] + length.to_bytes(2, "big") + header[4:10] + b"\0\0" + header[12:]
    return unsummed[:10] + checksum.checksum(unsummed).to_bytes(2, "big") + unsummed[12:]


def _transport(chain: Chain, payload_length: int) -> bytes:
    first = chain[0]
    check = checksum.add(_pseudo_header(first, first.own + payload_length)).to_bytes(2, "big")
    header = first.transport[: first.own]
    if first.fields.protocol == UDP:
        return header[:4] + (8 + payload_length).to_bytes(2, "big") + check
    flags = first.flags | chain[-1].flags & PSH
    return header[:13] + bytes([flags]) + header[14:16] + check + header[18:]


def _pseudo_header(packet: Packet, length: int) -> bytes:
    fields = packet.fields
    return checksum.pseudo_header(fields.source, fields.destination, fields.protocol, length)
