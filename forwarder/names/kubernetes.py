"""Services and EndpointSlices, as the Kubernetes API has them, into what the resolver is told. Pure.

Whoever lists and watches them hands the objects over; which of a service's slices changed does not matter
to the names, so each change puts the service anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any, Final

from forwarder.addresses import Address
from forwarder.names.records import Endpoint, Key, Port, Put, Remove, Replace, Service

SERVICE_LABEL: Final = "kubernetes.io/service-name"
SERVICES_PATH: Final = "/api/v1/services"
SLICES_PATH: Final = "/apis/discovery.k8s.io/v1/endpointslices"
OLD_SLICES_PATH: Final = "/apis/discovery.k8s.io/v1beta1/endpointslices"
"""Before Kubernetes 1.21. What is read here of a slice is the same in both."""

Name = tuple[str, str]
"""Namespace and name."""

_Backend = tuple[Endpoint, bool]
"""An endpoint, and whether it is ready."""


class ServiceTable:
    """What the API said last. An object that is no Service or EndpointSlice leaves what was known of it, and
    a sentence in `refused`."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self._services: dict[Name, Mapping[str, Any]] = {}
        self._slices: dict[Name, tuple[Name, tuple[_Backend, ...]]] = {}
        self._slices_of: dict[Name, dict[Name, None]] = {}

    def replace(self, services: Iterable[Mapping[str, Any]], slices: Iterable[Mapping[str, Any]]) -> Replace:
        """After listing both."""
        self._services, self._slices, self._slices_of, self.refused = {}, {}, {}, {}
        for one in slices:
            self._take_slice(one)
        for one in services:
            self._services[_name_of(one)] = _needed(one)
        found = (self._service(name) for name in self._services)
        return Replace(tuple(service for service in found if service is not None))

    def service_changed(self, event: str, one: Mapping[str, Any]) -> Put | Remove:
        """`event` is the watch's: ADDED, MODIFIED or DELETED."""
        name = _name_of(one)
        if event == "DELETED":
            self._services.pop(name, None)
            self.refused.pop(f"service/{'/'.join(name)}", None)
            return Remove((Key("service", *name),))
        self._services[name] = _needed(one)
        return self._put(name)

    def slice_changed(self, event: str, one: Mapping[str, Any]) -> Put:
        """As with services; a slice of a service we do not know yet waits for it."""
        own = _name_of(one)
        before = self._slices.get(own)
        if event == "DELETED":
            self._drop_slice(own)
        else:
            self._take_slice(one)
        after = self._slices.get(own)
        owners = {owner for owner, _ in filter(None, (before, after))}
        puts = [self._put(owner) for owner in owners]
        return Put(tuple(record for put in puts for record in put.records))

    def _put(self, name: Name) -> Put:
        service = self._service(name)
        return Put(() if service is None else (service,))

    def _service(self, name: Name) -> Service | None:
        if name not in self._services:
            return None
        backends = (backend for own in self._slices_of.get(name, {}) for backend in self._slices[own][1])
        try:
            service = read_service(self._services[name], backends)
        except ValueError as error:
            self.refused[f"service/{'/'.join(name)}"] = str(error)
            return None
        self.refused.pop(f"service/{'/'.join(name)}", None)
        return service

    def _take_slice(self, one: Mapping[str, Any]) -> None:
        own = _name_of(one)
        key = f"endpointslice/{'/'.join(own)}"
        try:
            labels = _get(one.get("metadata") or {}, "labels", dict, {})
            service = labels.get(SERVICE_LABEL)
            backends = tuple(_backends(one))
        except ValueError as error:
            self.refused[key] = str(error)
            return
        self.refused.pop(key, None)
        self._drop_slice(own)
        if isinstance(service, str):
            owner = own[0], service
            self._slices[own] = owner, backends
            self._slices_of.setdefault(owner, {})[own] = None

    def _drop_slice(self, own: Name) -> None:
        known = self._slices.pop(own, None)
        if known is not None:
            owner, _ = known
            del self._slices_of[owner][own]
            if not self._slices_of[owner]:
                del self._slices_of[owner]


def read_service(one: Mapping[str, Any], backends: Iterable[_Backend]) -> Service:
    """ValueError saying which field is wrong."""
    namespace, name = _name_of(one)
    spec = _get(one, "spec", dict, {})
    ports = tuple(
        Port(
            _get(port, "port", int, 0),
            _get(port, "name", str, ""),
            _get(port, "protocol", str, "TCP").lower(),
        )
        for port in _items(spec, "ports")
    )
    if _get(spec, "type", str, "ClusterIP") == "ExternalName":
        return Service(name, namespace, external_name=_get(spec, "externalName", str, ""), ports=ports)
    listed = _get(spec, "clusterIPs", list, None) or [_get(spec, "clusterIP", str, "")]
    cluster_ips = tuple(_address(text, "clusterIPs") for text in listed if text not in ("", "None"))
    if cluster_ips:
        return Service(name, namespace, cluster_ips, ports=ports)
    unready_too = _get(spec, "publishNotReadyAddresses", bool, False)
    endpoints = tuple(dict.fromkeys(endpoint for endpoint, ready in backends if ready or unready_too))
    return Service(name, namespace, ports=ports, endpoints=endpoints)


def _needed(one: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a Service; most of one's bytes are who changed what in it, and are not kept."""
    namespace, name = _name_of(one)
    return {"metadata": {"namespace": namespace, "name": name}, "spec": one.get("spec")}


def _backends(one: Mapping[str, Any]) -> Iterable[_Backend]:
    if _get(one, "addressType", str, "") == "FQDN":
        return
    for endpoint in _items(one, "endpoints"):
        # "A nil value should be interpreted as true": discovery/v1 EndpointConditions.
        ready = _get(_get(endpoint, "conditions", dict, {}), "ready", bool, True)
        addresses = tuple(
            _address(text, "endpoints.addresses") for text in _get(endpoint, "addresses", list, [])
        )
        yield Endpoint(addresses, _get(endpoint, "hostname", str, "")), ready


def _name_of(one: Mapping[str, Any]) -> Name:
    metadata = one.get("metadata")
    if not isinstance(metadata, dict):
        return "", ""
    return str(metadata.get("namespace", "")), str(metadata.get("name", ""))


def _address(text: Any, field: str) -> Address:
    try:
        return ip_address(str(text))
    except ValueError:
        raise ValueError(f"{field} has {text!r}, which must be an IP address") from None


def _items(table: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    items: list[Mapping[str, Any]] = _get(table, field, list, [])
    for item in items:
        if not isinstance(item, dict):
            raise ValueError(f"{field} has {item!r}, which must be an object")
    return items


def _get(table: Mapping[str, Any], field: str, kind: type, default: Any) -> Any:
    """`table[field]`, where null counts as absent, as Go writes it."""
    value = table.get(field)
    if value is None:
        return default
    if type(value) is not kind:
        raise ValueError(f"{field} is {value!r}, which must be of type {kind.__name__}")
    return value
