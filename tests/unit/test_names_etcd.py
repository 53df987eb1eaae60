"""Names from etcd: what its keys may say, and nodes that tell each other of their pods through a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from forwarder.config import own_record
from forwarder.discovery.etcd import open_client, root_of
from forwarder.faults import ConfigError
from forwarder.names.etcd import (
    MAX_PODS,
    PODS_SOURCE,
    SERVICES_SOURCE,
    pods_value,
    read_pods_value,
    read_service_value,
)
from forwarder.names.etcd_names import EtcdNames
from forwarder.names.etcd_publisher import PodPublisher
from forwarder.names.records import Change, Endpoint, Pod, Port, Replace, Service
from forwarder.names.zone import Zone
from tests.etcd_server import EtcdServer, eventually
from tests.unit.test_discovery_etcd import following, node_config
from tests.unit.test_names_zone import GATEWAYS

DOMAIN = "cluster.local"
NETWORKS = (ip_network("10.42.0.0/16"), ip_network("fd42::/48"))
WEB = Pod("web-0", (ip_address("10.42.1.5"), ip_address("fd42::5")), "shop", aliases=("web",))


def read(name: str, text: str) -> Service:
    return read_service_value(name, text.encode(), DOMAIN)


def test_a_service_is_a_table_without_its_name() -> None:
    text = '{"cluster_ips": ["10.43.0.10"], "ports": [{"name": "http", "port": 80}]}'
    expected = Service("web", "shop", (ip_address("10.43.0.10"),), ports=(Port(80, "http"),))
    assert read("services/shop/web", text) == expected
    headless = '{"endpoints": [{"addresses": ["10.42.1.5"], "hostname": "db-0"}]}'
    endpoints = (Endpoint((ip_address("10.42.1.5"),), "db-0"),)
    assert read("services/shop/db", headless) == Service("db", "shop", endpoints=endpoints)
    external = Service("mail", "shop", external_name="smtp.example.com")
    assert read("services/shop/mail", '{"external_name": "smtp.example.com"}') == external


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("services/web", "{}", "services/web is missing: must be services/NAMESPACE/NAME"),
        ("services/a/b/c", "{}", "must be services/NAMESPACE/NAME"),
        ("services/shop/web", "\x01", "services/shop/web = "),
        ("services/shop/web", "[" * 30_000, "must be JSON"),
        ("services/shop/web", "7", "must be a JSON object"),
        ("services/shop/web", '{"cluster_ip": "10.43.0.1"}', "did you mean cluster_ips?"),
        ("services/shop/web", '{"cluster_ips": ["x"]}', 'services/shop/web.cluster_ips[0] = "x"'),
        ("services/shop/web", '{"ports": [{"port": 0}]}', "services/shop/web.ports[0].port = 0"),
        ("services/shop/-", "{}", 'services/shop/-.name = "-"'),
        (
            "services/shop/web",
            '{"external_name": "a.b", "cluster_ips": ["10.43.0.1"]}',
            "must have only one of cluster_ips, external_name",
        ),
    ],
)
def test_a_faulty_service_is_refused_with_its_key(name: str, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(name, text)
    assert why in str(refused.value.faults[0])


def test_pods_come_back_as_they_were_put() -> None:
    assert read_pods_value("pods/n1", pods_value([WEB]), DOMAIN, NETWORKS) == ((WEB,), ())
    table = json.loads(pods_value([WEB]))
    table["pods"][0]["mood"] = "of a newer podloom"
    assert read_pods_value("pods/n1", json.dumps(table).encode(), DOMAIN, NETWORKS) == ((WEB,), ())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (7, "pods/n1.pods[0] = 7: must be an object"),
        ({"addresses": []}, "pods/n1.pods[0].name is missing"),
        ({"name": "a", "addresses": ["192.0.2.7"]}, "must lie inside one of cluster.cidrs"),
        ({"name": "a", "addresses": ["x"]}, 'pods/n1.pods[0].addresses[0] = "x"'),
        ({"name": "a b", "addresses": []}, 'pods/n1.pods[0].name = "a b"'),
        ({"name": "a", "addresses": [], "namespace": "a.b"}, "pods/n1.pods[0].namespace"),
        ({"name": ".".join(["a" * 63] * 4), "addresses": []}, "at most 253 characters"),
    ],
)
def test_a_faulty_pod_is_refused_and_the_rest_applies(row: Any, why: str) -> None:
    good = json.loads(pods_value([WEB]))["pods"]
    value = json.dumps({"pods": [row, *good]}).encode()
    pods, (fault,) = read_pods_value("pods/n1", value, DOMAIN, NETWORKS)
    assert pods == (WEB,)
    assert why in str(fault)


@pytest.mark.parametrize(
    "value", [b"\xff", b"[]", b"{}", b'{"pods": 7}', json.dumps({"pods": [1] * (MAX_PODS + 1)})]
)
def test_what_is_no_list_of_pods_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        read_pods_value("pods/n1", value if isinstance(value, bytes) else value.encode(), DOMAIN, NETWORKS)


# With a real etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path / "etcd")
    try:
        server.start()
        yield server
    finally:
        server.close()


async def briefly(seconds: float) -> None:
    await asyncio.sleep(seconds / 10)


class Names:
    """One node's part in the names of the cluster, and what its resolver would know."""

    def __init__(self, settings: Any) -> None:
        self.told: list[Change] = []  # of n2's pods
        self.zone = Zone(DOMAIN, GATEWAYS, (), (SERVICES_SOURCE, PODS_SOURCE))
        record, root = own_record(settings), root_of(settings.discovery)
        self.client = open_client(settings.discovery)
        endpoints = list(map(str, record.endpoints))
        self.publisher = PodPublisher(self.client, root, record.id, endpoints, sleep=briefly)
        self.names = EtcdNames(self.client, root, DOMAIN, NETWORKS, self.publisher, self.tell)

    def tell(self, source: str, change: Change) -> None:
        assert self.zone.apply(source, change) == []
        if source == f"{PODS_SOURCE} of n2":
            self.told.append(change)

    def found(self, name: str) -> list[str] | str:
        found = self.zone.look_up(f"{name}.{DOMAIN}", "A")
        assert found is not None
        return [rr.value for rr in found.answer] or found.rcode


@asynccontextmanager
async def naming(*settings: Any) -> AsyncIterator[list[Names]]:
    nodes = [Names(one) for one in settings]
    tasks = [asyncio.create_task(node.names.run()) for node in nodes]
    try:
        yield nodes
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for node in nodes:
            await node.client.close()


def test_pods_of_every_node_have_names_on_every_node(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    name = "web-0.shop.pod"
    both = node_config(etcd, 1), node_config(etcd, 2)

    async def story() -> None:
        async with following(*both), naming(*both) as (ours, theirs):
            await eventually(lambda: ours.found(name) == "NXDOMAIN", "the first word")
            theirs.publisher.put([WEB])
            await eventually(lambda: ours.found(name) == ["10.42.1.5"], "the pod's name")
            assert ours.found("web.shop.pod") == ["10.42.1.5"], "its alias"
            assert theirs.found(name) == "NXDOMAIN", "of its own pods a node knows sooner, from its store"
            told = len(ours.told)
            etcd.ctl("put", "/podloom/pods/n2", "\x01 junk")
            await eventually(lambda: "pods/n2" in caplog.text, "the refusal")
            await eventually(lambda: "web-0" in etcd.ctl("get", "/podloom/pods/n2"), "the true word")
            assert set(ours.told[told:]) <= {Replace((WEB,))}, "the last good word stayed"
            etcd.ctl("del", "/podloom/pods/n2")
            await eventually(
                lambda: ours.told[-2:] == [Replace(()), Replace((WEB,))], "its removal and return"
            )
            theirs.publisher.put([])
            await eventually(lambda: ours.found(name) == "NXDOMAIN", "the pod's end")
            theirs.publisher.put([WEB])
            await eventually(lambda: ours.found(name) == ["10.42.1.5"], "the pod's name")
            lease = json.loads(etcd.ctl("get", "/podloom/pods/n2", "-w", "json"))["kvs"][0]["lease"]
            told = len(ours.told)
            etcd.ctl("lease", "revoke", f"{lease:x}")
            await eventually(lambda: ours.told[told:] == [Replace(()), Replace((WEB,))], "the node's death")

    asyncio.run(story())


def test_services_are_what_the_keys_say(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    settings = node_config(etcd, 1)
    etcd.ctl("put", "/podloom/services/shop/db", '{"endpoints": [{"addresses": ["10.42.1.7"]}]}')
    etcd.ctl("put", "/podloom/services/shop/bad", '{"cluster_ips": 7}')

    async def story() -> None:
        async with following(settings), naming(settings) as (ours,):
            await eventually(lambda: ours.found("db.shop.svc") == ["10.42.1.7"], "the first word")
            etcd.ctl("put", "/podloom/services/shop/web", '{"cluster_ips": ["10.43.0.10"]}')
            await eventually(lambda: ours.found("web.shop.svc") == ["10.43.0.10"], "the service")
            etcd.ctl("put", "/podloom/services/shop/web", "junk")
            await eventually(lambda: "services/shop/web" in caplog.text, "the refusal")
            assert ours.found("web.shop.svc") == ["10.43.0.10"], "the last good word stays"
            etcd.stop()
            await eventually(lambda: "names are not up to date" in caplog.text, "the trouble")
            assert ours.found("web.shop.svc") == ["10.43.0.10"]
            etcd.start()
            etcd.ctl("del", "/podloom/services/shop/web")
            await eventually(lambda: ours.found("web.shop.svc") == "NXDOMAIN", "its end", 15)
            assert ours.found("db.shop.svc") == ["10.42.1.7"]

    asyncio.run(story())
    assert caplog.text.count("services/shop/bad.cluster_ips = 7") == 1


def test_who_is_not_registered_names_no_pods(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    """A clone: its id is in use at another address, and the pods under it stay the other's."""
    original = node_config(etcd, 1)
    elsewhere = replace(original.node, endpoints=(ip_address("192.0.2.77"),))
    thief = Pod("web-0", (ip_address("10.42.9.9"),), "shop")

    async def story() -> None:
        async with following(original), naming(original, replace(original, node=elsewhere)) as (ours, clone):
            ours.publisher.put([WEB])
            clone.publisher.put([thief])
            await eventually(lambda: "this node is not registered" in caplog.text, "the clone's word")
            value = etcd.ctl("get", "--print-value-only", "/podloom/pods/n1")
            assert "10.42.1.5" in value
            assert "10.42.9.9" not in value

    asyncio.run(story())
