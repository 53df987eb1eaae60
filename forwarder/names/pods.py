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
    def aliases(self) -> Sequence[str]: ...
    @property
    def leases(self) -> Sequence[Lease]: ...


def pods_of(records: Iterable[Attached]) -> tuple[Pod, ...]:
    """One pod for each name, with the addresses and the aliases of all its interfaces. A runtime without
    namespaces has its pods in `default`; one that knows only aliases names the pod by the first."""
    found: dict[tuple[str, str], tuple[list[Address], list[str]]] = {}
    for record in records:
        name = next(filter(None, (record.pod_name, *record.aliases)), "")
        if name:
            key = record.pod_namespace or DEFAULT_NAMESPACE, name
            addresses, aliases = found.setdefault(key, ([], []))
            addresses.extend(lease.address for lease in record.leases)
            aliases.extend(alias for alias in record.aliases if alias != name)
    return tuple(
        Pod(name, tuple(addresses), namespace, tuple(dict.fromkeys(aliases)))
        for (namespace, name), (addresses, aliases) in found.items()
    )
