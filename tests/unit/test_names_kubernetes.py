"""Objects as an API server writes them, and the names that follow."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from forwarder.names.kubernetes import SERVICE_LABEL, ServiceTable
from forwarder.names.records import Endpoint, Key, Port, Put, Remove, Replace, Service

ONE, TWO = ip_address("10.42.1.5"), ip_address("10.42.2.6")


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop", "resourceVersion": "7"}, "spec": spec}


def endpoint_slice(name: str, of: str, *endpoints: dict[str, Any], kind: str = "IPv4") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "labels": {SERVICE_LABEL: of}}
    return {"metadata": metadata, "addressType": kind, "endpoints": list(endpoints)}


HEADLESS = service("db", clusterIP="None", clusterIPs=["None"])
READY = {"addresses": ["10.42.1.5"], "hostname": "db-0", "conditions": {"ready": True}}
UNREADY = {"addresses": ["10.42.2.6"], "conditions": {"ready": False}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"type": "ClusterIP", "clusterIP": "10.43.0.1", "clusterIPs": ["10.43.0.1", "fd43::1"]},
            Service("x", "shop", (ip_address("10.43.0.1"), ip_address("fd43::1"))),
        ),
        ({"type": "NodePort", "clusterIP": "10.43.0.1"}, Service("x", "shop", (ip_address("10.43.0.1"),))),
        ({"type": "ExternalName", "externalName": "a.b"}, Service("x", "shop", external_name="a.b")),
        ({"clusterIP": "None"}, Service("x", "shop")),
        ({"clusterIP": ""}, Service("x", "shop")),
        (
            {
                "clusterIP": "10.43.0.1",
                "ports": [{"port": 80, "name": "http"}, {"port": 53, "protocol": "UDP"}],
            },
            Service("x", "shop", (ip_address("10.43.0.1"),), ports=(Port(80, "http"), Port(53, "", "udp"))),
        ),
        ({"clusterIP": "None", "ports": None}, Service("x", "shop")),
    ],
    ids=["both families", "node port", "external", "headless", "none assigned", "ports", "null"],
)
def test_services(spec: dict[str, Any], expected: Service) -> None:
    assert ServiceTable().replace([service("x", **spec)], []) == Replace((expected,))


def test_a_headless_service_leads_to_what_is_ready() -> None:
    slices = [endpoint_slice("db-a", "db", READY, UNREADY), endpoint_slice("other", "else", READY)]
    (found,) = ServiceTable().replace([HEADLESS], slices).records
    assert found == Service("db", "shop", endpoints=(Endpoint((ONE,), "db-0"),))
    published = service("db", clusterIP="None", publishNotReadyAddresses=True)
    (found,) = ServiceTable().replace([published], slices).records
    assert found == Service("db", "shop", endpoints=(Endpoint((ONE,), "db-0"), Endpoint((TWO,))))
    nil = endpoint_slice("db-b", "db", {"addresses": ["10.42.2.6"], "conditions": {}})
    names = endpoint_slice("db-c", "db", {"addresses": ["a.b"]}, kind="FQDN")
    (found,) = ServiceTable().replace([HEADLESS], [nil, names]).records
    assert found == Service("db", "shop", endpoints=(Endpoint((TWO,)),))


def test_changes_put_the_service_anew() -> None:
    table = ServiceTable()
    assert table.replace([], []) == Replace(())
    one, two = endpoint_slice("db-a", "db", READY), endpoint_slice("db-b", "db", {"addresses": ["10.42.2.6"]})
    assert table.slice_changed("ADDED", one) == Put(()), "its service is not known yet"
    first = Service("db", "shop", endpoints=(Endpoint((ONE,), "db-0"),))
    assert table.service_changed("ADDED", HEADLESS) == Put((first,))
    both = Service("db", "shop", endpoints=(*first.endpoints, Endpoint((TWO,))))
    assert table.slice_changed("ADDED", two) == Put((both,))
    assert table.slice_changed("MODIFIED", endpoint_slice("db-b", "db", UNREADY)) == Put((first,))
    assert table.slice_changed("DELETED", one) == Put((Service("db", "shop"),))
    assert table.slice_changed("DELETED", one) == Put(())
    assert table.service_changed("DELETED", HEADLESS) == Remove((Key("service", "shop", "db"),))
    assert table.slice_changed("MODIFIED", two) == Put(())


def test_a_slice_that_changes_its_service_changes_both() -> None:
    table = ServiceTable()
    table.replace([HEADLESS, service("web", clusterIP="None")], [endpoint_slice("s", "db", READY)])
    change = table.slice_changed("MODIFIED", endpoint_slice("s", "web", READY))
    assert set(change.records) == {
        Service("db", "shop"),
        Service("web", "shop", endpoints=(Endpoint((ONE,), "db-0"),)),
    }


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"clusterIPs": ["x"]}, "clusterIPs has 'x', which must be an IP address"),
        ({"clusterIPs": "10.43.0.1"}, "clusterIPs is '10.43.0.1', which must be of type list"),
        ({"ports": [80]}, "ports has 80, which must be an object"),
        ({"ports": [{"port": "80"}]}, "port is '80', which must be of type int"),
        ({"type": 1}, "type is 1, which must be of type str"),
        ({"clusterIP": "None", "publishNotReadyAddresses": 1}, "publishNotReadyAddresses is 1"),
    ],
)
def test_a_wrong_service_is_refused_and_the_rest_applies(spec: dict[str, Any], reason: str) -> None:
    table = ServiceTable()
    assert [found.name for found in table.replace([service("bad", **spec), HEADLESS], []).records] == ["db"]
    (key,) = table.refused
    assert (key, table.refused[key].startswith(reason)) == ("service/shop/bad", True)
    assert table.service_changed("MODIFIED", service("bad", clusterIP="10.43.0.1")).records  # type: ignore[union-attr]
    assert table.refused == {}


@pytest.mark.parametrize(
    "endpoint", [{"addresses": ["x"]}, {"addresses": "10.0.0.1"}, {"conditions": [], "addresses": []}, 7]
)
def test_a_wrong_slice_leaves_what_was_known(endpoint: Any) -> None:
    table = ServiceTable()
    known = table.replace([HEADLESS], [endpoint_slice("db-a", "db", READY)]).records
    assert table.slice_changed("MODIFIED", endpoint_slice("db-a", "db", endpoint)) == Put(known)
    assert list(table.refused) == ["endpointslice/shop/db-a"]
    table.slice_changed("MODIFIED", endpoint_slice("db-a", "db", READY))
    assert table.refused == {}


@pytest.mark.parametrize("junk", [{}, {"metadata": []}, {"metadata": None, "spec": {}}])
def test_what_is_no_object_has_no_name(junk: dict[str, Any]) -> None:
    table = ServiceTable()
    table.slice_changed("ADDED", junk)
    change = table.service_changed("ADDED", junk)
    assert [record.name for record in getattr(change, "records", ())] == [""], "which no zone takes"
