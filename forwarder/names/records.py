"""What has a name: pods and services, how a source of them speaks, and both as JSON. Pure.

Terms are Kubernetes's; a source of any other kind fills in what it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final, NamedTuple, TypeAlias

from forwarder.addresses import Address

DEFAULT_NAMESPACE: Final = "default"
PROTOCOLS: Final = ("tcp", "udp", "sctp")

MAX_NAME_CHARACTERS: Final = 253  # RFC 1035 section 2.3.4, as text without the final dot

MAX_RRS: Final = 1 << 16
"""Of one record: every named port of a headless service makes one with every backend, and whoever may make
services may give one ten thousand of both."""

LABEL_PATTERN: Final = r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
NAME_PATTERN: Final = rf"{LABEL_PATTERN}(\.{LABEL_PATTERN})*"
PORT_NAME_PATTERN: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,13}[A-Za-z0-9])?"  # RFC 6335 section 5.1


class Key(NamedTuple):
    """What tells a source's records apart. `kind` is "pod" or "service"."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True, slots=True)
class Pod:
    """`aliases` are further names of the same pod in its namespace."""

    name: str
    addresses: tuple[Address, ...]
    namespace: str = DEFAULT_NAMESPACE
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return Key("pod", self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class Port:
    """Only a named port has SRV records. `protocol` is one of PROTOCOLS."""

    port: int
    name: str = ""
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One ready backend of a headless service; without a hostname its address makes one."""

    addresses: tuple[Address, ...]
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """An alias if `external_name` is set, else a service with cluster IPs if it has any, else headless.

    `endpoints` are the ready ones (all of them where publishNotReadyAddresses is set).
    """

    name: str
    namespace: str = DEFAULT_NAMESPACE
    cluster_ips: tuple[Address, ...] = ()
    external_name: str = ""
    ports: tuple[Port, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()

    @property
    def key(self) -> Key:
        return Key("service", self.namespace, self.name)


Record: TypeAlias = Pod | Service


@dataclass(frozen=True, slots=True)
class Replace:
    """Everything the source has now."""

    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """New records, or new states of those known by their keys."""

    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Remove:
    """Records that are gone; an unknown key is no error."""

    keys: tuple[Key, ...]


Change: TypeAlias = Replace | Put | Remove
"""What a source of names says. The sources do not know of each other: the same name in two has the
addresses of both."""


def rr_count(record: Record) -> int:
    """How many resource records one record makes at most."""
    if isinstance(record, Pod):
        return (2 + len(record.aliases)) * len(record.addresses)
    backends = sum(len(endpoint.addresses) for endpoint in record.endpoints)
    return len(record.ports) * max(backends, 1) + 3 * backends + 2 * len(record.cluster_ips)


def refusal(record: Record, domain: str) -> str:
    """Why a record cannot be in the DNS: what, its value and what is allowed; empty if it can."""
    if (count := rr_count(record)) > MAX_RRS:
        return f"it makes {count} resource records, and must make at most {MAX_RRS}"
    for what, text, pattern, allowed in _texts(record):
        if not re.fullmatch(pattern, text):
            return f"{what} {text[:80]!r} must be {allowed}"
    kind = "pod" if isinstance(record, Pod) else "svc"
    for name in _names(record):
        whole = f"{name}.{record.namespace}.{kind}.{domain}"
        if len(whole) > MAX_NAME_CHARACTERS:
            return f"{whole[:80]!r}… must be at most {MAX_NAME_CHARACTERS} characters"
    return ""


def _texts(record: Record) -> Iterator[tuple[str, str, str, str]]:
    label = LABEL_PATTERN, "a DNS label"
    name = NAME_PATTERN, "a DNS name"
    yield "namespace", record.namespace, *label
    if isinstance(record, Pod):
        yield "name", record.name, *name
        for alias in record.aliases:
            yield "alias", alias, *name
        return
    yield "name", record.name, *label
    if record.external_name:
        yield "external name", record.external_name.removesuffix("."), *name
    for endpoint in record.endpoints:
        if endpoint.hostname:
            yield "hostname", endpoint.hostname, *label
    for port in record.ports:
        if port.name:
            yield "port name", port.name, PORT_NAME_PATTERN, "1 to 15 letters, digits and hyphens"
        yield "protocol", port.protocol, "|".join(PROTOCOLS), " or ".join(PROTOCOLS)


def _names(record: Record) -> Iterator[str]:
    if isinstance(record, Pod):
        yield from (record.name, *record.aliases)
        return
    yield from (f"_{port.name}._{port.protocol}.{record.name}" for port in record.ports)
    yield from (f"{endpoint.hostname}.{record.name}" for endpoint in record.endpoints)
    if len(record.external_name) > MAX_NAME_CHARACTERS:
        yield record.external_name


def to_json(change: Change) -> dict[str, Any]:
    match change:
        case Replace(records):
            return {"replace": [_record_to_json(record) for record in records]}
        case Put(records):
            return {"put": [_record_to_json(record) for record in records]}
        case Remove(keys):
            return {"remove": [list(key) for key in keys]}


def from_json(body: Mapping[str, Any]) -> Change:
    """The inverse of `to_json`, for what it made."""
    if "remove" in body:
        return Remove(tuple(Key(*key) for key in body["remove"]))
    if "put" in body:
        return Put(tuple(map(_record_from_json, body["put"])))
    return Replace(tuple(map(_record_from_json, body["replace"])))


def _record_to_json(record: Record) -> dict[str, Any]:
    body: dict[str, Any] = {"kind": record.key.kind, "namespace": record.namespace, "name": record.name}
    if isinstance(record, Pod):
        return body | {"addresses": list(map(str, record.addresses)), "aliases": record.aliases}
    return body | {
        "cluster_ips": list(map(str, record.cluster_ips)),
        "external_name": record.external_name,
        "ports": [(port.port, port.name, port.protocol) for port in record.ports],
        "endpoints": [(list(map(str, one.addresses)), one.hostname) for one in record.endpoints],
    }


def _record_from_json(body: Mapping[str, Any]) -> Record:
    if body["kind"] == "pod":
        addresses = _addresses(body["addresses"])
        return Pod(body["name"], addresses, body["namespace"], tuple(body["aliases"]))
    return Service(
        body["name"],
        body["namespace"],
        _addresses(body["cluster_ips"]),
        body["external_name"],
        tuple(Port(*port) for port in body["ports"]),
        tuple(Endpoint(_addresses(addresses), hostname) for addresses, hostname in body["endpoints"]),
    )


def _addresses(texts: list[str]) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))
