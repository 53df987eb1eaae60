"""What an RFC 8926 endpoint that understands no option says of a datagram."""

from __future__ import annotations

ETHERNET = 0x6558  # Transparent Ethernet Bridging, the one payload we take


def faults(datagram: bytes) -> set[str]:
    """Every reason for which the datagram must be dropped, by name; empty: deliver it.

    A header that is cut or of an unknown version has that one fault: none of its other fields mean anything.
    """
    if len(datagram) < 8:
        return {"TUNNEL_SHORT"}
    if datagram[0] >> 6 != 0:
        return {"TUNNEL_VERSION"}
    found = set[str]()
    if datagram[1] & 0x80:
        found.add("TUNNEL_OAM")
    if int.from_bytes(datagram[2:4], "big") != ETHERNET:
        found.add("TUNNEL_PROTOCOL")
    option_bytes = (datagram[0] & 0x3F) * 4
    if len(datagram) < 8 + option_bytes:
        found.add("TUNNEL_OPTIONS")
    else:
        found |= option_faults(datagram[8 : 8 + option_bytes])
    return found


def option_faults(options: bytes) -> set[str]:
    """Sections 3.5 and 3.5.1: options fill their length exactly; an unknown critical one forbids delivery.

    The header's C bit is not asked: it must be set when an option is critical, and a sender that forgot is
    no reason to deliver; where it is set and no option is critical, every option was parsed and none objects.
    """
    found = set[str]()
    while options:
        length = 4 + (options[3] & 0x1F) * 4
        if length > len(options):
            return found | {"TUNNEL_OPTIONS"}
        if options[2] & 0x80:
            found.add("TUNNEL_CRITICAL_OPTION")
        options = options[length:]
    return found


def decode(datagram: bytes) -> tuple[int, int]:
    """(VNI, header length) of a datagram without faults."""
    return int.from_bytes(datagram[4:7], "big"), 8 + (datagram[0] & 0x3F) * 4
