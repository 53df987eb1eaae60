"""CNI results and errors in every spec version we speak. Pure.

Inside podloom a result is always the newest shape; only `result_json` knows how older ones differ.
Source: containernetworking/cni SPEC.md, versions 0.3.0 to 1.1.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]

_WITH_IP_VERSION = frozenset({"0.3.0", "0.3.1", "0.4.0"})  # `ips[].version` went away with 1.0.0
_WITH_LINK_DETAILS = frozenset({"1.1.0"})
ROUTE_DETAILS = ("mtu", "advmss", "priority", "table", "scope")  # since 1.1.0


class Code(IntEnum):
    """Error codes: 0-99 are the spec's (8 and 999 the reference library's), from 100 on ours."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    INVALID_NETNS = 8
    TRY_AGAIN_LATER = 11
    CANNOT_ADD = 50
    LIMITED_CONNECTIVITY = 51
    KERNEL_REFUSED = 100
    ALREADY_ATTACHED = 101
    CHECK_FAILED = 102
    GC_INCOMPLETE = 103
    DELEGATE_FAILED = 104
    INTERNAL = 999


class CniError(Exception):
    """A failure as the runtime will read it. `version` is the caller's, once known to be one of ours."""

    def __init__(self, code: Code, msg: str, details: str = "", version: str | None = None) -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details
        self.version = version


@dataclass(frozen=True)
class Interface:
    """One link. `sandbox` is its namespace's path, empty for a link on the host."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int | None = None
    socket_path: str = ""
    pci_id: str = ""


@dataclass(frozen=True)
class Ip:
    """One address in CIDR form; `interface` is an index into the result's interfaces."""

    address: str
    gateway: str = ""
    interface: int | None = None


@dataclass(frozen=True)
class Route:
    """One route in the pod; `details` holds those of ROUTE_DETAILS that are set."""

    dst: str
    gw: str = ""
    details: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What an ADD made, or the result of the plugins before us in the chain."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Mapping[str, Any] = field(default_factory=dict)

    def followed_by(self, later: Result) -> Result:
        """This result with a later plugin's appended; its interface indexes move along."""
        shift = len(self.interfaces)
        moved = tuple(
            ip if ip.interface is None else replace(ip, interface=ip.interface + shift) for ip in later.ips
        )
        return Result(
            self.interfaces + later.interfaces,
            self.ips + moved,
            self.routes + later.routes,
            later.dns or self.dns,
        )


def parse_result(raw: Mapping[str, Any]) -> Result:
    """A prevResult of any version from 0.3.0 on; raises CniError naming the field that does not fit."""
    return Result(
        interfaces=tuple(
            Interface(
                name=_get(item, "name", str, ""),
                mac=_get(item, "mac", str, ""),
                sandbox=_get(item, "sandbox", str, ""),
                mtu=_get(item, "mtu", int, 0) or None,
                socket_path=_get(item, "socketPath", str, ""),
                pci_id=_get(item, "pciID", str, ""),
            )
            for item in _items(raw, "interfaces")
        ),
        ips=tuple(
            Ip(
                address=_get(item, "address", str, ""),
                gateway=_get(item, "gateway", str, ""),
                interface=_interface_index(item),
            )
            for item in _items(raw, "ips")
        ),
        routes=tuple(
            Route(
                dst=_get(item, "dst", str, ""),
                gw=_get(item, "gw", str, ""),
                details={key: item[key] for key in ROUTE_DETAILS if _get(item, key, int, None) is not None},
            )
            for item in _items(raw, "routes")
        ),
        dns=_get(raw, "dns", dict, {}),
    )


def result_json(result: Result, version: str) -> str:
    """The success object of `version`, one of VERSIONS."""
    body: dict[str, Any] = {"cniVersion": version}
    if result.interfaces:
        body["interfaces"] = [_interface_object(interface, version) for interface in result.interfaces]
    if result.ips:
        body["ips"] = [_ip_object(ip, version) for ip in result.ips]
    if result.routes:
        body["routes"] = [_route_object(route, version) for route in result.routes]
    if result.dns:
        body["dns"] = dict(result.dns)
    return _line(body)


def error_json(error: CniError) -> str:
    """The error object; the spec lists cniVersion in it, so it is there even when the caller gave none."""
    body = {"cniVersion": error.version or NEWEST, "code": int(error.code), "msg": error.msg}
    if error.details:
        body["details"] = error.details
    return _line(body)


def version_json(asked: str | None) -> str:
    """The VERSION answer: the caller's own cniVersion, and what we speak."""
    return _line({"cniVersion": asked or NEWEST, "supportedVersions": list(VERSIONS)})


def _interface_object(interface: Interface, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {"name": interface.name, "mac": interface.mac, "sandbox": interface.sandbox}
    if version in _WITH_LINK_DETAILS:
        details = {"mtu": interface.mtu, "socketPath": interface.socket_path, "pciID": interface.pci_id}
        body |= {key: value for key, value in details.items() if value}
    return body


def _ip_object(ip: Ip, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {"address": ip.address}
    if version in _WITH_IP_VERSION:
        body["version"] = "6" if ":" in ip.address else "4"
    if ip.gateway:
        body["gateway"] = ip.gateway
    if ip.interface is not None:
        body["interface"] = ip.interface
    return body


def _route_object(route: Route, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {"dst": route.dst}
    if route.gw:
        body["gw"] = route.gw
    if version in _WITH_LINK_DETAILS:
        body |= route.details
    return body


def _interface_index(item: Mapping[str, Any]) -> int | None:
    """Other plugins leave the index out, or write -1, for an address that belongs to no interface."""
    index = _get(item, "interface", int, None)
    return None if index is None or index < 0 else index


def _items(raw: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    items: list[Mapping[str, Any]] = _get(raw, key, list, [])
    for item in items:
        if not isinstance(item, dict):
            raise CniError(Code.INVALID_CONFIG, f"prevResult.{key}: {item!r} is not an object")
    return items


def _get(item: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """`item[key]`, where null counts as absent: Go writes it for an empty list or pointer."""
    value = item.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CniError(Code.INVALID_CONFIG, f"prevResult: {key} is {value!r}, not a {kind.__name__}")
    return value


def _line(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":")) + "\n"
