"""What an RFC 7348 endpoint says of a datagram, with and without the Linux driver's strictness."""

from __future__ import annotations


def fault(datagram: bytes, *, strict: bool) -> str | None:
    """The drop reason by name, or None to deliver."""
    if len(datagram) < 8:
        return "TUNNEL_SHORT"
    if not datagram[0] & 0b0000_1000:
        return "TUNNEL_FLAGS"
    reserved_is_set = datagram[0] != 0b0000_1000 or any(datagram[1:4]) or datagram[7] != 0
    return "TUNNEL_FLAGS" if strict and reserved_is_set else None


def decode(datagram: bytes) -> tuple[int, int]:
    """(VNI, header length) of a datagram without a fault."""
    return int.from_bytes(datagram[4:7], "big"), 8
