"""What a Kubernetes Node object says of a peer, and what ours is to say. Pure.

Two dialects of annotations: our own, and flannel's for clusters that flannel's VXLAN backend serves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from forwarder.addresses import Network, format_mac
from forwarder.config import read_record
from forwarder.faults import MISSING, ConfigError, Fault
from forwarder.peers import PeerRecord
from forwarder.registry import Refusal, Said

OURS: Final = "podloom.dev/"
ENDPOINTS: Final = OURS + "endpoints"
FEATURES: Final = OURS + "features"

FLANNEL: Final = "flannel.alpha.coreos.com/"
FLANNEL_PORT: Final = 8472
FLANNEL_FAMILIES: Final = {4: ("public-ip", "backend-data"), 6: ("public-ipv6", "backend-v6-data")}
"""By IP version. flannel has a VXLAN device for each, which carries that version inside and outside, and a
MAC for each device."""


def name_of(node: Mapping[str, Any]) -> str:
    return str(node["metadata"]["name"])


def annotations_of(node: Mapping[str, Any]) -> Mapping[str, str]:
    return node["metadata"].get("annotations") or {}


def pod_cidrs(node: Mapping[str, Any]) -> list[str]:
    """spec.podCIDRs, or of a single-stack Node of old spec.podCIDR."""
    spec = node.get("spec") or {}
    return spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])


def network_unavailable(node: Mapping[str, Any]) -> bool:
    """Whether somebody waits for the network of this Node to be said to be there."""
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(
        item.get("type") == "NetworkUnavailable" and item.get("status") != "False" for item in conditions
    )


def other_machine(node: Mapping[str, Any], ours: Collection[str], *, announced: bool) -> str:
    """The endpoints of another machine that is this Node too, by its annotations; empty if none is. `ours`
    are those that this machine has, or had.

    Once we were `announced`, whoever else writes there is one. Before, what is there may be our own from
    before a change of addresses, unless it is an address of the Node's and none of ours is."""
    standing = annotations_of(node).get(ENDPOINTS)
    if standing is None or set(standing.split(",")) <= set(ours):
        return ""
    status = node.get("status") or {}
    addresses = {item.get("address") for item in status.get("addresses") or ()}
    theirs = not addresses.isdisjoint(standing.split(",")) and addresses.isdisjoint(ours)
    return standing if announced or theirs else ""


def read_ours(node: Mapping[str, Any]) -> dict[str, Said]:
    """By key, the peer that a Node describes; none while no podloom has spoken for it."""
    annotations, key = annotations_of(node), f"node {name_of(node)}"
    if ENDPOINTS not in annotations:
        return {}
    table: dict[str, Any] = {
        "id": name_of(node),
        "endpoints": annotations[ENDPOINTS].split(","),
        "prefixes": pod_cidrs(node),
        "features": annotations.get(FEATURES, "").split(","),
    }
    for name in ("router-mac", "encapsulation"):
        if OURS + name in annotations:
            table[name.replace("-", "_")] = annotations[OURS + name]
    for name in ("port", "vni"):
        if OURS + name in annotations:
            table[name] = _number(annotations[OURS + name])
    return {key: _read(table, key)}


def write_ours(record: PeerRecord) -> dict[str, str]:
    """The annotations by which others read the record."""
    return {
        ENDPOINTS: ",".join(map(str, record.endpoints)),
        OURS + "router-mac": format_mac(record.router_mac),
        OURS + "encapsulation": record.encapsulation,
        OURS + "port": str(record.port),
        OURS + "vni": str(record.vni),
        FEATURES: ",".join(record.features),
    }


def read_flannel(node: Mapping[str, Any]) -> dict[str, Said]:
    """By key, the peers that a Node of flannel's VXLAN backend is: one for each IP version, since their
    MACs differ."""
    annotations = annotations_of(node)
    if annotations.get(FLANNEL + "kube-subnet-manager") != "true":
        return {}
    said: dict[str, Said] = {}
    for version, (address_name, data_name) in FLANNEL_FAMILIES.items():
        prefixes = [cidr for cidr in pod_cidrs(node) if (":" in cidr) == (version == 6)]
        if FLANNEL + address_name not in annotations or not prefixes:
            continue
        key = f"node {name_of(node)} ({FLANNEL}{data_name})"
        if (kind := annotations.get(FLANNEL + "backend-type")) != "vxlan":
            said[key] = Refusal((Fault(key, kind, 'must have the backend-type "vxlan"'),))
            continue
        try:
            data = json.loads(annotations.get(FLANNEL + data_name, ""))
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            text = annotations.get(FLANNEL + data_name, MISSING)
            said[key] = Refusal((Fault(key, text, "must be a JSON object with VNI and VtepMAC"),))
            continue
        table = {
            "id": name_of(node) if version == 4 else f"{name_of(node)}.v6"[-63:],
            "endpoints": [annotations[FLANNEL + address_name]],
            "port": FLANNEL_PORT,
            "encapsulation": "vxlan",
            "vni": data.get("VNI"),
            "router_mac": data.get("VtepMAC"),
            "prefixes": prefixes,
        }
        said[key] = _read(table, key)
    return said


def write_flannel(record: PeerRecord, annotations: Mapping[str, str]) -> dict[str, str]:
    """The annotations by which flannel's nodes read the record. One that an operator made, to have another
    public address announced, is obeyed as flannel does."""
    wanted = {FLANNEL + "kube-subnet-manager": "true", FLANNEL + "backend-type": "vxlan"}
    data = json.dumps({"VNI": record.vni, "VtepMAC": format_mac(record.router_mac)}, separators=(",", ":"))
    for version, (address_name, data_name) in FLANNEL_FAMILIES.items():
        endpoint = next((address for address in record.endpoints if address.version == version), None)
        if endpoint is None or not _has(record.prefixes, version):
            continue
        overwrite = annotations.get(f"{FLANNEL}{address_name}-overwrite")
        wanted[FLANNEL + address_name] = overwrite or str(endpoint)
        wanted[FLANNEL + data_name] = data
    return wanted


def _has(prefixes: tuple[Network, ...], version: int) -> bool:
    return any(prefix.version == version for prefix in prefixes)


def _number(text: str) -> int | str:
    """What is no number stays as it is, to be refused with its text."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


def _read(table: dict[str, Any], key: str) -> Said:
    try:
        return read_record(table, key)
    except ConfigError as error:
        return Refusal(error.faults)
