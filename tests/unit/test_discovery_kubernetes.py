"""The Kubernetes source against an API server that forgets, falls silent, refuses and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from forwarder import config
from forwarder.addresses import derive_mac, format_mac
from forwarder.config import Config
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Trouble, Upsert
from forwarder.discovery.kube_client import from_kubeconfig, in_cluster
from forwarder.discovery.kube_nodes import (
    network_unavailable,
    other_machine,
    read_flannel,
    read_ours,
    write_flannel,
    write_ours,
)
from forwarder.discovery.kubernetes import KubernetesSource
from forwarder.faults import ConfigError
from forwarder.node import identify
from forwarder.peers import FEATURES, PeerRecord
from forwarder.registry import Refusal
from tests.etcd_server import eventually
from tests.kube_api import KubeApi, node

RECORD = PeerRecord(
    id="two",
    endpoints=(ip_address("192.0.2.2"), ip_address("2001:db8::2")),
    port=8472,
    encapsulation="vxlan",
    vni=1,
    router_mac=bytes.fromhex("020000000002"),
    prefixes=(ip_network("10.42.2.0/24"), ip_network("fd42:0:0:2::/64")),
)
CIDRS = tuple(map(str, RECORD.prefixes))


def settings(api: KubeApi, tmp_path: Path, discovery: str = "", **user: Any) -> Config:
    return identify(
        config.parse(f"""
[cluster]
cidrs = ["10.42.0.0/16", "fd42::/48"]
[node]
id = "a-stored-id"
endpoints = ["192.0.2.1", "2001:db8::1"]
[tunnel]
encapsulation = "vxlan"
vxlan_ports = [8472]
[discovery]
source = "kubernetes"
node_name = "one"
kubeconfig = "{api.kubeconfig(tmp_path / "kubeconfig", **user)}"
{discovery}
""")
    )


class Follower:
    """The source as the daemon follows it."""

    def __init__(self, source: KubernetesSource) -> None:
        self.source = source
        self.items: list[Item] = []
        self.said: dict[str, Any] = {}
        self.fault: str | None = "nothing said yet"
        self.unannounced: str | None = "nothing said yet"

    async def follow(self) -> None:
        async for item in self.source.watch():
            self.items.append(item)
            match item:
                case Announced(fault, _):
                    self.unannounced = fault
                    continue
                case Trouble(faults):
                    self.fault = "; ".join(faults)
                    continue
                case Snapshot(said):
                    self.said = dict(said)
                case Upsert(key, value):
                    self.said[key] = value
                case Remove(key):
                    del self.said[key]
                case Current():
                    pass
            self.fault = None

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.said.values() if isinstance(record, PeerRecord)]


@asynccontextmanager
async def following(
    api: KubeApi, tmp_path: Path, discovery: str = "", **options: Any
) -> AsyncIterator[Follower]:
    await api.start()
    source = KubernetesSource(settings(api, tmp_path, discovery), **options)
    follower = Follower(source)
    try:
        await asyncio.wait_for(source.own_prefixes(), 10)
        task = asyncio.create_task(follower.follow())
        try:
            yield follower
        finally:
            task.cancel()
            await asyncio.wait([task])
    finally:
        await source.close()
        await api.stop()


def api_of(*nodes: dict[str, Any]) -> KubeApi:
    api = KubeApi()
    api.nodes = {one["metadata"]["name"]: one for one in nodes}
    for version, one in enumerate(nodes):
        one["metadata"]["resourceVersion"] = str(version)
    return api


def test_our_annotations_say_the_record() -> None:
    (said,) = read_ours(node("two", *CIDRS, annotations=write_ours(RECORD))).values()
    assert said == RECORD
    assert read_ours(node("two", *CIDRS)) == {}


def test_features_are_told_and_unknown_ones_left_alone() -> None:
    able = replace(RECORD, features=FEATURES)
    annotations = write_ours(able)
    (said,) = read_ours(node("two", *CIDRS, annotations=annotations)).values()
    assert said == able
    annotations["podloom.dev/features"] += ",teleport"
    (said,) = read_ours(node("two", *CIDRS, annotations=annotations)).values()
    assert said == able


def test_flannels_annotations_say_a_peer_for_each_ip_version() -> None:
    annotations = write_flannel(RECORD, {})
    assert annotations == {
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/public-ip": "192.0.2.2",
        "flannel.alpha.coreos.com/backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}',
        "flannel.alpha.coreos.com/public-ipv6": "2001:db8::2",
        "flannel.alpha.coreos.com/backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}',
    }
    four, six = read_flannel(node("two", *CIDRS, annotations=annotations)).values()
    assert isinstance(four, PeerRecord)
    assert isinstance(six, PeerRecord)
    assert (four.id, four.endpoints, four.prefixes) == ("two", RECORD.endpoints[:1], RECORD.prefixes[:1])
    assert (six.id, six.endpoints, six.prefixes) == ("two.v6", RECORD.endpoints[1:], RECORD.prefixes[1:])
    assert (four.port, four.vni, four.router_mac) == (8472, 1, RECORD.router_mac)
    assert read_flannel(node("two", *CIDRS)) == {}


def test_an_operators_public_address_is_announced() -> None:
    overwrite = {"flannel.alpha.coreos.com/public-ip-overwrite": "198.51.100.2"}
    assert write_flannel(RECORD, overwrite)["flannel.alpha.coreos.com/public-ip"] == "198.51.100.2"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("endpoints", "here", 'node two.endpoints[0] = "here": must be an IP address'),
        ("endpoints", "", "node two.endpoints[0]"),
        ("router-mac", "x", 'node two.router_mac = "x"'),
        ("port", "65536", "node two.port = 65536"),
        ("port", "many", 'node two.port = "many"'),
        ("vni", "9" * 99, "node two.vni = "),
        ("encapsulation", "gre", 'node two.encapsulation = "gre"'),
    ],
)
def test_a_faulty_annotation_is_refused_with_its_key(key: str, value: str, why: str) -> None:
    annotations = write_ours(RECORD) | {f"podloom.dev/{key}": value}
    (said,) = read_ours(node("two", *CIDRS, annotations=annotations)).values()
    assert isinstance(said, Refusal)
    assert str(said.faults[0]).startswith(why)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("backend-data", "null", "must be a JSON object with VNI and VtepMAC"),
        ("backend-data", "{", "must be a JSON object"),
        ("backend-data", '{"VNI": "1", "VtepMAC": 7}', ".vni = "),
        ("backend-type", "host-gw", 'must have the backend-type "vxlan"'),
        ("public-ip", "nowhere", ".endpoints[0] = "),
    ],
)
def test_a_faulty_annotation_of_flannels_is_refused(key: str, value: str, why: str) -> None:
    annotations = write_flannel(RECORD, {}) | {f"flannel.alpha.coreos.com/{key}": value}
    said = next(iter(read_flannel(node("two", *CIDRS, annotations=annotations)).values()))
    assert isinstance(said, Refusal)
    assert why in str(said.faults[0])


def test_a_node_is_announced_and_others_are_followed(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", "10.42.1.0/24", unavailable=True), node("two", *CIDRS), node("three"))
        async with following(api, tmp_path) as one:
            await eventually(lambda: one.unannounced is None, "the announcement")
            await eventually(
                lambda: "podloom.dev/endpoints" in api.nodes["one"]["metadata"]["annotations"], "it"
            )
            own = api.nodes["one"]["metadata"]["annotations"]
            assert own["podloom.dev/endpoints"] == "192.0.2.1,2001:db8::1"
            assert own["podloom.dev/router-mac"] == format_mac(derive_mac("a-stored-id", "router"))
            assert not network_unavailable(api.nodes["one"])
            assert {"type": "Ready", "status": "False"} in api.nodes["one"]["status"]["conditions"]
            assert one.ids == []
            await api.put(node("two", *CIDRS, annotations=write_ours(RECORD)))
            await eventually(lambda: one.ids == ["two"], "the second node")
            await api.put(node("two", *CIDRS, annotations={}))
            await eventually(lambda: one.ids == [], "its silence")
            await api.put(node("two", *CIDRS, annotations=write_ours(RECORD)))
            await eventually(lambda: one.ids == ["two"], "its return")
            await api.delete("two")
            await eventually(lambda: one.ids == [], "its departure")
            patches = [request for request in api.requests if request[0] == "PATCH"]
            assert len(patches) == 1

    asyncio.run(story())


def test_a_node_that_moves_changes_its_annotation(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", "10.42.1.0/24"))
        async with following(api, tmp_path) as one:
            await eventually(lambda: one.unannounced is None, "the announcement")
            before = settings(api, tmp_path)
            moved = replace(before, node=replace(before.node, endpoints=(ip_address("192.0.2.77"),)))
            one.source.relocate(moved)

            def announced() -> bool:
                own = api.nodes["one"]["metadata"]["annotations"]
                return bool(own["podloom.dev/endpoints"] == "192.0.2.77")

            await eventually(announced, "the new endpoint", 4.0)

    asyncio.run(story())


def test_a_node_waits_for_its_pod_cidrs(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one"))
        await api.start()
        source = KubernetesSource(settings(api, tmp_path))
        try:
            asking = asyncio.create_task(source.own_prefixes())
            await eventually(lambda: len(api.requests) >= 2, "two tries")
            assert not asking.done()
            await api.put(node("one", *CIDRS))
            assert await asyncio.wait_for(asking, 10) == RECORD.prefixes
        finally:
            await source.close()
            await api.stop()

    asyncio.run(story())


def test_annotations_that_somebody_removes_are_put_again(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        async with following(api, tmp_path) as one:
            for _ in range(3):
                await eventually(lambda: api.nodes["one"]["metadata"]["annotations"], "the annotations")
                await api.put(node("one", *CIDRS))
            await eventually(lambda: api.nodes["one"]["metadata"]["annotations"], "the annotations")
            assert one.unannounced is None
            await api.delete("one")
            await eventually(lambda: "there is no Node one" in str(one.unannounced), "the alarm")
            await api.put(node("one", *CIDRS))
            await eventually(lambda: one.unannounced is None, "its end")

    asyncio.run(story())


def test_of_two_machines_that_are_one_node_the_other_fences_itself(tmp_path: Path) -> None:
    """A cloned VM: the one that started last is announced, and they do not write over each other for ever."""

    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        async with following(api, tmp_path) as one:
            await eventually(lambda: one.unannounced is None, "the announcement")
            clone = {"podloom.dev/endpoints": "192.0.2.77"}
            await api.put(node("one", *CIDRS, annotations=clone))
            await eventually(lambda: "192.0.2.77 is Node one too" in str(one.unannounced), "the alarm")
            assert one.items[-1] == Announced(one.unannounced, fenced=True)
            asked = len(api.requests)
            await api.put(node("one", *CIDRS, annotations=clone))  # as with every word of its kubelet
            await api.put(node("two", "10.42.2.0/24", annotations=write_ours(RECORD)))
            await eventually(lambda: one.ids == ["two"], "what happens afterwards")
            await asyncio.sleep(0.3)  # longer than until the next try
            assert not [request for request in api.requests[asked:] if request[0] == "PATCH"]
            assert api.nodes["one"]["metadata"]["annotations"] == clone
            await api.put(node("one", *CIDRS))
            await eventually(lambda: one.unannounced is None, "its end, when the other's word is removed")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("addresses", "announced", "other"),
    [
        ((), False, ""),
        ((), True, "192.0.2.77"),
        (("192.0.2.77",), False, "192.0.2.77"),
        (("192.0.2.77", "192.0.2.2"), False, ""),
        (("10.0.0.1",), False, ""),
    ],
    ids=[
        "perhaps ours of before",
        "we are there",
        "the kubelet's",
        "both are",
        "the kubelet has another network",
    ],
)
def test_whose_a_node_is(addresses: tuple[str, ...], announced: bool, other: str) -> None:
    found = node("two", annotations={"podloom.dev/endpoints": "192.0.2.77"})
    found["status"]["addresses"] = [{"type": "InternalIP", "address": address} for address in addresses]
    ours = set(map(str, RECORD.endpoints))
    assert other_machine(found, ours, announced=announced) == other
    assert other_machine(found, {*ours, "192.0.2.77"}, announced=True) == "", "we had it"
    assert other_machine(node("two", annotations=write_ours(RECORD)), ours, announced=True) == ""
    assert other_machine(node("two"), ours, announced=True) == ""


def test_a_refused_patch_is_said_and_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        api.refuse_patches = True
        async with following(api, tmp_path) as one:
            await eventually(lambda: "is forbidden" in str(one.unannounced), "the alarm")
            api.refuse_patches = False
            await eventually(lambda: one.unannounced is None, "its end")

    asyncio.run(story())


def test_what_the_server_forgot_is_listed_again(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS), node("two", "10.42.2.0/24", annotations=write_ours(RECORD)))
        async with following(api, tmp_path, watch_seconds=1) as one:
            await eventually(lambda: one.ids == ["two"], "the second node")
            await eventually(lambda: one.unannounced is None, "the announcement")
            del api.nodes["two"]  # without an event, as if it happened while nobody watched
            await api.forget()
            await eventually(lambda: one.ids == [], "a new list")

    asyncio.run(story())


def test_ending_watches_are_resumed_where_they_were(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        async with following(api, tmp_path, watch_seconds=1) as one:
            await eventually(lambda: one.unannounced is None, "the announcement")

            def watches() -> list[dict[str, str]]:
                return [query for _, _, query in api.requests if "watch" in query]

            await eventually(lambda: len(watches()) >= 3, "three watches")
            assert watches()[-1]["resourceVersion"] == str(api._version)
            assert all(query["allowWatchBookmarks"] == "true" for query in watches())
            assert (
                sum(1 for _, path, query in api.requests if path == "/api/v1/nodes" and "watch" not in query)
                == 1
            )
            assert one.fault is None

    asyncio.run(story())


def test_a_silent_server_is_noticed_and_its_return(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS), node("two", "10.42.2.0/24", annotations=write_ours(RECORD)))
        async with following(api, tmp_path, watch_seconds=1) as one:
            await eventually(lambda: one.ids == ["two"], "the second node")
            api.silent = True
            await eventually(lambda: "no answer in time" in str(one.fault), "the trouble", 15)
            assert one.ids == ["two"]
            api.silent = False
            await eventually(lambda: one.fault is None, "the end of it", 15)
            await api.put(node("three", "10.42.3.0/24", annotations=write_ours(RECORD)))
            await eventually(lambda: one.ids == ["two", "three"], "what happens afterwards")

    asyncio.run(story())


def test_an_absent_server_is_asked_at_intervals_and_found_again(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        async with following(api, tmp_path) as one:
            await eventually(lambda: one.fault is None, "the list")
            port = int(api.url.rpartition(":")[2])
            await api.stop()
            await eventually(lambda: one.fault is not None, "the trouble")
            assert sum(isinstance(item, Trouble) for item in one.items) == 1
            await api.start(port=port)
            await eventually(lambda: one.fault is None, "the end of it")

    asyncio.run(story())


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "{}",
        '{"items": 7}',
        '{"items": [7], "metadata": {"resourceVersion": "1"}}',
        '{"items": [], "metadata": {}}',
        '{"items": [{"metadata": {"name": 7}}], "metadata": {"resourceVersion": "1"}}',
        '{"items": [{"metadata": {"name": "x", "annotations": 7}}], "metadata": {"resourceVersion": "1"}}',
    ],
)
def test_whatever_else_answers_in_the_api_servers_place_is_trouble(tmp_path: Path, answer: str) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        async with following(api, tmp_path) as one:
            await eventually(lambda: one.fault is None, "the list")
            api.nonsense = answer
            await api.forget()
            await eventually(lambda: one.fault is not None, "the trouble")
            api.nonsense = None
            await eventually(lambda: one.fault is None, "the end of it")

    asyncio.run(story())


def test_many_nodes_come_in_pages(tmp_path: Path) -> None:
    async def story() -> None:
        more = [
            node(f"n{number:04}", f"10.42.{number % 250}.0/24", annotations=write_ours(RECORD))
            for number in range(1200)
        ]
        async with following(api_of(node("one", *CIDRS), *more), tmp_path) as one:
            await eventually(lambda: len(one.said) == 1200, "all of them")

    asyncio.run(story())


def test_a_token_is_sent(tmp_path: Path) -> None:
    async def story() -> None:
        api = api_of(node("one", *CIDRS))
        api.token = "secret"  # noqa: S105
        await api.start()
        source = KubernetesSource(settings(api, tmp_path, token="secret"))  # noqa: S106
        try:
            assert await asyncio.wait_for(source.own_prefixes(), 10) == RECORD.prefixes
        finally:
            await source.close()
            await api.stop()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no kubeconfig with a current context"),
        ("[", "cannot be used"),
        ("current-context: x\ncontexts: []", "is no kubeconfig with a current context"),
        (
            "current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n"
            "clusters: [{name: c, cluster: {server: 'https://192.0.2.9'}}]\n"
            "users: [{name: u, user: {exec: {command: aws}}}]",
            "names a program to log in with",
        ),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_kubeconfig(path)
    assert caught.value.faults[0].key == "discovery.kubeconfig"
    assert why in str(caught.value)
    with pytest.raises(ConfigError, match="does not run in a pod"):
        in_cluster({}, tmp_path)
