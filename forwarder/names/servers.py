"""Upstream servers: how they are written, and those of resolv.conf(5). Pure."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

from forwarder.addresses import Address

DNS_PORT: Final = 53
MAX_SERVERS: Final = 3
"""Of resolv.conf, as in the C library (MAXNS)."""


class Server(NamedTuple):
    """A resolver that is asked what is not in the zone."""

    address: Address
    port: int = DNS_PORT

    def __str__(self) -> str:
        if self.port == DNS_PORT:
            return str(self.address)
        host = f"[{self.address}]" if self.address.version == 6 else self.address
        return f"{host}:{self.port}"


def parse_server(text: str) -> Server:
    """ "192.0.2.1", "192.0.2.1:5353", "2001:db8::1" or "[2001:db8::1]:5353". ValueError if it is none."""
    host, port = text, str(DNS_PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]:")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    address = ip_address(host)
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("the port must be from 1 to 65535")
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError("a scope cannot be used")
    if address.is_multicast or address.is_unspecified:
        raise ValueError("must be one host's address")
    return Server(address, int(port))


def parse_resolv_conf(text: str) -> tuple[Server, ...]:
    """Its name servers; those we cannot use (with a scope) are left out."""
    servers = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                servers.append(Server(parse_server(words[1]).address))
            except ValueError:
                continue
    return tuple(servers[:MAX_SERVERS])
