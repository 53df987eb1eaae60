"""What is attached on this node, as pods with names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from forwarder.addresses import Address
from forwarder.names.records import DEFAULT_NAMESPACE, Pod


class Lease(Protocol):
    @property
    def address(self) -> Address: ...


class Attached(Protocol):
    """What the CNI store says of one interface; the runtime gave the pod's name, or left it empty."""

    @property
    def pod_namespace(self) -> str: ...
    @property
    def pod_name(self) -> str: ...
    @property
    def leases(self) -> Sequence[Lease]: ...


def pods_of(records: Iterable[Attached]) -> tuple[Pod, ...]:
    """One pod for each name, with the addresses of all its interfaces. A runtime without namespaces has its
    pods in `default`."""
    addresses: dict[tuple[str, str], list[Address]] = {}
    for record in records:
        if record.pod_name:
            name = record.pod_namespace or DEFAULT_NAMESPACE, record.pod_name
            addresses.setdefault(name, []).extend(lease.address for lease in record.leases)
    return tuple(Pod(name, tuple(found), namespace) for (namespace, name), found in addresses.items())
