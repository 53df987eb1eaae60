"""TCP segments and UDP datagrams with every header field a keyword, alone or as superframes.

Packed by hand: quick enough for a hundred thousand of them, and a case is one `but` away from its twin.
"""

from __future__ import annotations

import struct
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

TCP, UDP = 6, 17
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

# linux/virtio_net.h
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80
VIRTIO = struct.Struct("<BBHHHH")

DESTINATION_OPTIONS = 60
PADDED_EXTENSION = bytes([1, 4, 0, 0, 0, 0])  # RFC 8200 section 4.2: PadN that fills eight bytes


@dataclass(frozen=True)
class Packet:
    """One IP packet in its Ethernet frame. What its family or protocol lacks is left out."""

    source: str
    destination: str
    _: KW_ONLY
    protocol: int = TCP
    tos: int = 0
    ttl: int = 64
    flow_label: int = 0
    identification: int = 0
    dont_fragment: bool = True
    more_fragments: bool = False
    ip_options: bytes = b""
    extensions: tuple[int, ...] = ()
    """IPv6 extension headers by number, eight bytes of padding each."""
    source_port: int = 40_000
    destination_port: int = 5_001
    sequence: int = 1_000
    acknowledgement: int = 7
    flags: int = ACK
    reserved_bits: int = 0
    """The four beside the data offset; the lowest is AccECN's AE."""
    window: int = 502
    urgent: int = 0
    tcp_options: bytes = b""
    payload: bytes = b""
    ethernet: bytes = b"\2\0\0\0\2\1\2\0\0\0\1\1"
    """Destination and source address."""
    padding: bytes = b""

    @property
    def family(self) -> int:
        return 6 if ":" in self.source else 4

    @property
    def ip_header_length(self) -> int:
        """Extension headers included."""
        return 20 + len(self.ip_options) if self.family == 4 else 40 + 8 * len(self.extensions)

    @property
    def headers_length(self) -> int:
        """From the IP header to the payload."""
        return self.ip_header_length + (8 if self.protocol == UDP else 20 + len(self.tcp_options))

    def frame(self) -> bytes:
        """The frame with every checksum right."""
        transport = self._transport(len(self.payload), 0)
        total = ones_complement_sum(self._pseudo_header(len(transport) + len(self.payload)))
        total += ones_complement_sum(transport + self.payload)
        check = 0xFFFF - fold(total)
        if self.protocol == UDP and check == 0:
            check = 0xFFFF  # RFC 768
        return self._around(self._transport(len(self.payload), check))

    def partial(self) -> bytes:
        """The frame as its sender's stack leaves it for a checksum offload to finish: the field holds the
        pseudo-header's sum, not complemented."""
        length = self.headers_length - self.ip_header_length + len(self.payload)
        check = fold(ones_complement_sum(self._pseudo_header(length)))
        return self._around(self._transport(len(self.payload), check))

    def superframe(self, size: int, **changed: int) -> tuple[bytes, bytes]:
        """(virtio_net_hdr, frame) as a TAP with every offload hands it over, to be cut into segments of
        `size`. `changed` are fields of the header to lie about: flags, gso_type, header_length, gso_size,
        checksum_start, checksum_offset."""
        fields = {
            "flags": NEEDS_CSUM,
            "gso_type": GSO_UDP_L4 if self.protocol == UDP else GSO_TCPV4 if self.family == 4 else GSO_TCPV6,
            "header_length": 14 + self.headers_length,
            "gso_size": size,
            "checksum_start": 14 + self.ip_header_length,
            "checksum_offset": 6 if self.protocol == UDP else 16,
        }
        assert changed.keys() <= fields.keys()
        return VIRTIO.pack(*(fields | changed).values()), self.partial()

    def but(self, **changed: Any) -> Packet:
        """The same, some fields changed."""
        return replace(self, **changed)

    def followed_by(self, payload: bytes, **changed: Any) -> Packet:
        """What its sender would send next, some fields changed."""
        following = replace(
            self,
            payload=payload,
            identification=(self.identification + 1) & 0xFFFF,
            sequence=(self.sequence + len(self.payload)) & 0xFFFFFFFF,
        )
        return following.but(**changed)

    def _pseudo_header(self, length: int) -> bytes:
        addresses = packed(self.source) + packed(self.destination)
        return addresses + struct.pack("!IHH", length, 0, self.protocol)

    def _transport(self, payload_length: int, check: int) -> bytes:
        ports = self.source_port, self.destination_port
        if self.protocol == UDP:
            return struct.pack("!4H", *ports, 8 + payload_length, check)
        offset = (20 + len(self.tcp_options)) // 4 << 4 | self.reserved_bits
        return (
            struct.pack(
                "!HHIIBBHHH",
                *ports,
                self.sequence,
                self.acknowledgement,
                offset,
                self.flags,
                self.window,
                check,
                self.urgent,
            )
            + self.tcp_options
        )

    def _around(self, transport: bytes) -> bytes:
        data = transport + self.payload
        return self.ethernet + (self._ipv4(data) if self.family == 4 else self._ipv6(data)) + self.padding

    def _ipv4(self, data: bytes) -> bytes:
        header = struct.pack(
            "!BBHHHBBH8s",
            4 << 4 | self.ip_header_length // 4,
            self.tos,
            self.ip_header_length + len(data),
            self.identification,
            self.dont_fragment << 14 | self.more_fragments << 13,
            self.ttl,
            self.protocol,
            0,
            packed(self.source) + packed(self.destination),
        )
        header += self.ip_options
        check = 0xFFFF - fold(ones_complement_sum(header))
        return b"\x08\x00" + header[:10] + check.to_bytes(2, "big") + header[12:] + data

    def _ipv6(self, data: bytes) -> bytes:
        chain = [*self.extensions, self.protocol]
        header = struct.pack(
            "!IHBB",
            6 << 28 | self.tos << 20 | self.flow_label,
            8 * len(self.extensions) + len(data),
            chain[0],
            self.ttl,
        )
        extensions = b"".join(bytes([following, 0]) + PADDED_EXTENSION for following in chain[1:])
        return b"\x86\xdd" + header + packed(self.source) + packed(self.destination) + extensions + data


@lru_cache
def packed(address: str) -> bytes:
    return ip_address(address).packed


def ones_complement_sum(data: bytes) -> int:
    """The sum of RFC 1071 as one division: 2**16 is 1 modulo 0xFFFF. Zero only if every byte is."""
    whole = int.from_bytes(data + b"\0" * (len(data) % 2), "big")
    return whole % 0xFFFF or (0xFFFF if whole else 0)


def fold(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total
