"""What an operator says about names: the [names] table and the [[service]] tables. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from forwarder.addresses import Address
from forwarder.faults import Fault
from forwarder.names.records import (
    LABEL_PATTERN,
    NAME_PATTERN,
    PORT_NAME_PATTERN,
    PROTOCOLS,
    Endpoint,
    Key,
    Pod,
    Port,
    Service,
    refusal,
)
from forwarder.names.servers import parse_server
from forwarder.toml_values import (
    Kind,
    RefusedError,
    integer,
    kind_of,
    list_of,
    matching,
    one_of,
    read_section,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NamesConfig:
    """`addresses` are those it answers on beside the gateways'. `upstream` are servers as
    `servers.parse_server` reads them; none stands for the host's."""

    enabled: bool = False
    domain: str = "cluster.local"
    addresses: tuple[Address, ...] = ()
    upstream: tuple[str, ...] = ()
    queries_per_second: int = 1000
    cache_bytes: int = 8 << 20


def names_example() -> str:
    """The commented tables, for the example of the whole file."""
    names = NamesConfig()
    return f"""\
[names]
# A resolver on the gateways' addresses, port 53, for this node's pods and this host only: pods as
# NAME.NAMESPACE.pod.DOMAIN, services as NAME.NAMESPACE.svc.DOMAIN, their addresses' names, all else from
# upstream. Pods whose CNI configuration says nothing about DNS are told of it.
#enabled = false
#domain = "{names.domain}"
# Further addresses it answers on, this node's own for that, and the same on every node: such as what kubelets
# tell their pods (clusterDNS), if that is no Service's.
#addresses = []
# Servers such as "192.0.2.53", "192.0.2.53:5353" or "[2001:db8::53]:53". []: those of /etc/resolv.conf.
#upstream = []
# Of one pod; what is above is not answered.
#queries_per_second = {names.queries_per_second}
# How much memory upstream's answers may take.
#cache_bytes = {names.cache_bytes}

# Services of no source, changed by a reload. With etcd, keys services/NAMESPACE/NAME below key_prefix hold
# the same as JSON, without the names. With cluster_ips,
#[[service]]
#name = "web"
#namespace = "default"
#cluster_ips = ["10.43.0.10", "fd43::10"]
#ports = [{{ name = "http", port = 80, protocol = "tcp" }}]
# headless, which leads to its endpoints (hostname may be left out),
#[[service]]
#name = "db"
#endpoints = [{{ addresses = ["10.42.1.5"], hostname = "db-0" }}]
# or as another name for something.
#[[service]]
#name = "mail"
#external_name = "smtp.example.com"
"""


def read_services(tables: dict[str, Any], domain: str, faults: list[Fault]) -> tuple[Service, ...]:
    """The [[service]] tables, taken out of `tables`."""
    rows = tables.pop("service", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        faults.append(Fault("service", rows, "must be tables, one for each service: [[service]]"))
        return ()
    services: list[Service] = []
    for index, row in enumerate(rows):
        key = f"service[{index}]"
        service = read_service(row, key, domain, faults)
        if service is None:
            continue
        if service.key in {other.key for other in services}:
            faults.append(Fault(key, _shown(service.key), "must not be there twice"))
        else:
            services.append(service)
    return tuple(services)


def read_service(table: Mapping[str, Any], key: str, domain: str, faults: list[Fault]) -> Service | None:
    """The service that one table describes; None if any value was refused."""
    service = read_section(Service, _SERVICE, table, key, faults)
    if service is None:
        return None
    if reason := _conflict(service) or refusal(service, domain):
        faults.append(Fault(key, service.name, reason))
        return None
    return service


def read_pod(table: Mapping[str, Any], key: str, domain: str, faults: list[Fault]) -> Pod | None:
    """The same for a pod. What we do not know is left alone: a newer podloom may have written it."""
    known = {name: value for name, value in table.items() if name in _POD}
    pod = read_section(Pod, _POD, known, key, faults)
    if pod is not None and (reason := refusal(pod, domain)):
        faults.append(Fault(key, pod.name, reason))
        return None
    return pod


def _conflict(service: Service) -> str:
    given = [name for name in ("cluster_ips", "external_name", "endpoints") if getattr(service, name)]
    return f"must have only one of {', '.join(given)}" if len(given) > 1 else ""


def _shown(key: Key) -> str:
    return f"{key.namespace}/{key.name}"


def _table(section: type[T], kinds: Mapping[str, Kind]) -> Kind:
    """A table inside a table."""
    allowed = f"must be a table of {', '.join(kinds)}"

    def convert(value: Any) -> T:
        if not isinstance(value, dict):
            raise RefusedError(("", value, allowed))
        faults: list[Fault] = []
        converted = read_section(section, kinds, value, "", faults)
        if converted is None:
            raise RefusedError(*faults)
        return converted

    return Kind(convert, allowed)


def _server(text: str) -> str:
    try:
        return str(parse_server(text))
    except ValueError:
        raise ValueError from None


def _host(text: str) -> Address:
    address = ipaddress.ip_address(text)
    if address.is_multicast or address.is_unspecified or "%" in text:
        raise ValueError("must be one host's address")
    return address


_LABEL = "must be a DNS label: up to 63 letters, digits, - and _"
_ADDRESSES = list_of(kind_of(str, "must be an IP address", _host), "must be a list of IP addresses")
_PORT: Final = {
    "port": integer(1, 65535),
    "name": matching(rf"({PORT_NAME_PATTERN})?", "must be 1 to 15 letters, digits and hyphens"),
    "protocol": one_of(*PROTOCOLS),
}
_ENDPOINT: Final = {"addresses": _ADDRESSES, "hostname": matching(rf"({LABEL_PATTERN})?", _LABEL)}
_SERVICE: Final = {
    "name": matching(LABEL_PATTERN, _LABEL),
    "namespace": matching(LABEL_PATTERN, _LABEL),
    "cluster_ips": _ADDRESSES,
    "external_name": matching(rf"({NAME_PATTERN})?", "must be a DNS name"),
    "ports": list_of(_table(Port, _PORT), "must be a list of tables of name, port and protocol"),
    "endpoints": list_of(_table(Endpoint, _ENDPOINT), "must be a list of tables of addresses and hostname"),
}
_POD: Final = {
    "name": matching(NAME_PATTERN, "must be a DNS name"),
    "addresses": _ADDRESSES,
    "namespace": matching(LABEL_PATTERN, _LABEL),
    "aliases": list_of(matching(NAME_PATTERN, "must be a DNS name"), "must be a list of DNS names"),
}
NAMES: Final = {
    "enabled": kind_of(bool, "must be true or false"),
    "domain": matching(NAME_PATTERN, 'must be a DNS name such as "cluster.local"'),
    "addresses": _ADDRESSES,
    "upstream": list_of(
        kind_of(str, 'must be a server such as "192.0.2.53" or "[2001:db8::53]:5353"', _server),
        "must be a list of servers",
    ),
    "queries_per_second": integer(1, 1_000_000),
    "cache_bytes": integer(1 << 16, 1 << 30),
}
"""The kinds of the [names] table's values."""
