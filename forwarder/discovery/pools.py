"""Which prefix of the cluster's networks a node takes. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from ipaddress import ip_network

from forwarder.addresses import Network


class NoPrefixError(RuntimeError):
    """Every prefix of a network is taken; the text says of which."""


def choose(
    cidrs: Sequence[Network], lengths: dict[int, int], taken: Collection[Network], node_id: str
) -> tuple[Network, ...]:
    """A free prefix of each network, of the length given by IP version, that overlaps none of the taken.

    The search begins at a place of the node's own, so that nodes which start together seldom want the same
    one, and a node whose claim was forgotten wants the one it had."""
    return tuple(_choose(cidr, lengths[cidr.version], taken, node_id) for cidr in cidrs)


def _choose(cidr: Network, length: int, taken: Collection[Network], node_id: str) -> Network:
    in_the_way = sorted(
        _numbers(cidr, length, other)
        for other in taken
        if other.version == cidr.version and other.overlaps(cidr)
    )
    count = 1 << (length - cidr.prefixlen)
    digest = hashlib.sha256(f"podloom prefix {node_id}".encode()).digest()
    start = int.from_bytes(digest[:8], "big") % count
    number = _first_free(in_the_way, start, count)
    if number is None:
        number = _first_free(in_the_way, 0, start)
    if number is None:
        raise NoPrefixError(f"all {count} prefixes of {cidr} that are /{length} are taken")
    return _prefix(cidr, length, number)


def _numbers(cidr: Network, length: int, other: Network) -> tuple[int, int]:
    """The first and the last number of the prefixes that share an address with the other."""
    shift = cidr.max_prefixlen - length
    base = int(cidr.network_address)
    first = max(int(other.network_address), base)
    last = min(int(other.broadcast_address), int(cidr.broadcast_address))
    return (first - base) >> shift, (last - base) >> shift


def _first_free(in_the_way: Sequence[tuple[int, int]], start: int, end: int) -> int | None:
    number = start
    for first, last in in_the_way:
        if last < number:
            continue
        if first > number:
            break
        number = last + 1
    return number if number < end else None


def _prefix(cidr: Network, length: int, number: int) -> Network:
    address = int(cidr.network_address) + (number << (cidr.max_prefixlen - length))
    return ip_network((address.to_bytes(cidr.max_prefixlen // 8, "big"), length))
