"""This node's place on the underlay: which of the host's addresses are its endpoints, and how much their
devices carry. Pure: `links.observe` says what the host has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from forwarder.addresses import Address, Network

AUTO: Final = "auto"
"""As a device: the one of the default route."""


@dataclass(frozen=True, slots=True)
class Device:
    """A link and its unicast addresses that a socket can be bound to, the preferred first; none that are
    link-local."""

    name: str
    mtu_bytes: int
    loopback: bool
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Host:
    """The devices that have addresses, and by IP version the device of the default route."""

    devices: tuple[Device, ...] = ()
    default_routes: Mapping[int, str] = field(default_factory=dict)


class UnderlayError(RuntimeError):
    """The host has not what the configuration names; the text says what to do."""


def endpoints_of(
    choice: str, host: Host, cluster_cidrs: Sequence[Network], current: Sequence[Address] = ()
) -> tuple[Address, ...]:
    """What `node.device` stands for: the device's IPv4 address, or its IPv6 address if it has no other; none
    of the pods' own. The `current` one as long as it is there, whatever is added beside it. UnderlayError if
    there is none."""
    for version in (4, 6):
        name = host.default_routes.get(version) if choice == AUTO else choice
        found = [
            address
            for address in _addresses(host, name)
            if address.version == version and not any(address in cidr for cidr in cluster_cidrs)
        ]
        kept = [address for address in current if address in found]
        if found:
            return ((kept or found)[0],)
    if choice == AUTO:
        raise UnderlayError(
            "this host has no default route by a device with an address, and node.device is "
            f'"{AUTO}": set node.device or node.endpoints'
        )
    raise UnderlayError(f"{choice} has no address: correct node.device, or give it one")


def device_mtus(
    endpoints: Sequence[Address], host: Host, before: Mapping[int, int] | None = None
) -> dict[int, int]:
    """By IP version the MTU of the endpoint's device; what it was `before` while its address is gone.
    UnderlayError if that is not known, or the device is not one that a wire begins at."""
    mtus: dict[int, int] = {}
    for endpoint in endpoints:
        device = next((device for device in host.devices if endpoint in device.addresses), None)
        if device is None and before is not None and endpoint.version in before:
            mtus[endpoint.version] = before[endpoint.version]
        elif device is None:
            raise UnderlayError(
                f"no device of this host has the address {endpoint}: correct node.endpoints or add it"
            )
        elif device.loopback:
            raise UnderlayError(
                f"{endpoint} is on {device.name}, whose MTU says nothing of the wire's: "
                "set tunnel.underlay_mtu_bytes"
            )
        else:
            mtus[endpoint.version] = device.mtu_bytes
    return mtus


def _addresses(host: Host, name: str | None) -> Iterator[Address]:
    for device in host.devices:
        if device.name == name:
            yield from device.addresses
