"""What etcd's keys say of names: services that operators put there, and pods, by the nodes they are on. Pure.

`services/NAMESPACE/NAME` holds a [[service]] table as JSON, without its name and namespace. `pods/NODE` holds
that node's pods; it has the lease of the node's record and goes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from forwarder.addresses import Network
from forwarder.faults import MISSING, ConfigError, Fault
from forwarder.names.options import read_pod, read_service
from forwarder.names.records import Key, Pod, Service

SERVICES: Final = "services/"
PODS: Final = "pods/"
SERVICES_SOURCE: Final = "etcd services"
PODS_SOURCE: Final = "etcd pods"
"""What the resolver knows these sources by; the pods of a node have its id behind that. Under PODS_SOURCE
itself nothing is said but that all nodes' pods were."""

MAX_PODS: Final = 10_000
"""Of one node; a kubelet has some hundred."""


def service_key(name: str) -> Key | None:
    """Which service a key is about, after what all keys begin with; None if it names none."""
    kind, _, rest = name.partition("/")
    namespace, slash, service = rest.partition("/")
    if f"{kind}/" != SERVICES or not (namespace and slash and service) or "/" in service:
        return None
    return Key("service", namespace, service)


def read_service_value(name: str, value: bytes, domain: str) -> Service:
    """The service under a key. ConfigError with every fault in it, each below the key."""
    key = service_key(name)
    if key is None:
        raise ConfigError([Fault(name, MISSING, f"must be {SERVICES}NAMESPACE/NAME")])
    table = _object(name, value)
    faults: list[Fault] = []
    service = read_service({**table, "namespace": key.namespace, "name": key.name}, name, domain, faults)
    if service is None:
        raise ConfigError(faults)
    return service


def read_pods_value(
    name: str, value: bytes, domain: str, networks: Sequence[Network]
) -> tuple[tuple[Pod, ...], tuple[Fault, ...]]:
    """The pods of a node that are sound, and what is wrong with the others. An address must be of the
    cluster's `networks`: no node can give a name to anything else. ConfigError if there are none to read."""
    rows = _object(name, value).get("pods")
    if not isinstance(rows, list) or len(rows) > MAX_PODS:
        raise ConfigError([Fault(f"{name}.pods", MISSING, f"must be a list of at most {MAX_PODS} pods")])
    pods: list[Pod] = []
    faults: list[Fault] = []
    for index, row in enumerate(rows):
        key = f"{name}.pods[{index}]"
        if not isinstance(row, dict):
            faults.append(Fault(key, row, "must be an object"))
            continue
        pod = read_pod(row, key, domain, faults)
        if pod is None:
            continue
        strange = [one for one in pod.addresses if not any(one in network for network in networks)]
        if strange:
            faults.append(Fault(f"{key}.addresses", strange[0], "must lie inside one of cluster.cidrs"))
        else:
            pods.append(pod)
    return tuple(pods), tuple(faults)


def pods_value(pods: Iterable[Pod]) -> bytes:
    """What `read_pods_value` reads the pods from."""
    rows = [
        {
            "namespace": pod.namespace,
            "name": pod.name,
            "addresses": list(map(str, pod.addresses)),
            "aliases": list(pod.aliases),
        }
        for pod in pods
    ]
    return json.dumps({"pods": rows}).encode()


def _object(name: str, value: bytes) -> dict[str, Any]:
    try:
        table = json.loads(value)
    except (ValueError, RecursionError) as error:
        shown = value[:40].decode("utf-8", "replace")
        raise ConfigError([Fault(name, shown, f"must be JSON: {error}")]) from None
    if not isinstance(table, dict):
        raise ConfigError([Fault(name, table, "must be a JSON object")])
    return table
