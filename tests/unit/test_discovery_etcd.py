"""The etcd source against a real etcd on loopback, which is stopped, frozen, compacted and lied to."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from forwarder import config
from forwarder.addresses import derive_mac, format_mac
from forwarder.config import Config
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Trouble, Upsert
from forwarder.discovery.etcd import EtcdSource, open_client
from forwarder.discovery.etcd_client import EtcdClient, EtcdError, Put
from forwarder.garbage import many_objects
from forwarder.node import identify
from forwarder.peers import PeerRecord
from forwarder.plan import with_prefixes
from forwarder.registry import Refusal, Registry
from tests.etcd_server import EtcdServer, eventually
from tests.virtual_time import VirtualTime

pytestmark = pytest.mark.timeout(90)

Story = Callable[[], Awaitable[None]]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path / "etcd")
    try:
        server.start()
        yield server
    finally:
        server.close()


def node_config(
    etcd: EtcdServer,
    number: int,
    *,
    cidr: str = "10.42.0.0/16",
    node: str = "",
    lease_seconds: int = 3,
    discovery: str = "",
) -> Config:
    return identify(
        config.parse(f"""
[cluster]
cidrs = ["{cidr}"]
[node]
id = "n{number}"
endpoints = ["192.0.2.{number}"]
{node}
[discovery]
source = "etcd"
urls = ["{etcd.url}"]
lease_seconds = {lease_seconds}
hold_seconds = {2 * lease_seconds}
{discovery}
""")
    )


class Follower:
    """A node's source as the daemon follows it: what it said, and what stands by it."""

    def __init__(self, settings: Config, **options: Any) -> None:
        self.source = EtcdSource(settings, **options)
        self.items: list[Item] = []
        self.said: dict[str, Any] = {}
        self.fault: str | None = "nothing said yet"
        self.unannounced: str | None = "nothing said yet"
        self.fenced = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Follower:
        self.prefixes = await asyncio.wait_for(self.source.own_prefixes(), 10)
        self._task = asyncio.create_task(self._follow())
        return self

    async def _follow(self) -> None:
        async for item in self.source.watch():
            self.items.append(item)
            match item:
                case Announced(fault, fenced):
                    self.unannounced, self.fenced = fault, fenced
                    continue
                case Trouble(faults):
                    self.fault = "; ".join(faults)
                    continue
                case Snapshot(said):
                    self.said = dict(said)
                case Upsert(key, value):
                    self.said[key] = value
                case Remove(key):
                    self.said.pop(key, None)
                case Current():
                    pass
            self.fault = None

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            assert self._task.cancelled()
        await self.source.close()

    @property
    def ids(self) -> set[str]:
        return {record.id for record in self.said.values() if isinstance(record, PeerRecord)}


@asynccontextmanager
async def following(*settings: Config, **options: Any):  # type: ignore[no-untyped-def]
    followers = [Follower(one, **options) for one in settings]
    try:
        for follower in followers:
            await follower.start()
        yield followers
    finally:
        for follower in followers:
            await follower.stop()


def test_nodes_find_each_other_and_keep_their_prefixes(etcd: EtcdServer) -> None:
    async def story() -> None:
        async with following(*(node_config(etcd, number) for number in (1, 2, 3))) as nodes:
            for node in nodes:
                others = {f"n{number}" for number in (1, 2, 3)} - {node.source._config.node.id}
                await eventually(lambda node=node, others=others: node.ids == others, "the others")
                await eventually(lambda node=node: node.unannounced is None, "the announcement")
            prefixes = [node.prefixes for node in nodes]
            assert len({*prefixes}) == 3
            record = next(iter(nodes[0].said.values()))
            assert record.prefixes in prefixes
            assert record.router_mac == derive_mac(record.id, "router")
        # Stopped and started again, as after an upgrade: the record still lives, and so does the prefix.
        async with following(node_config(etcd, 2)) as (again,):
            assert again.prefixes == prefixes[1]

    asyncio.run(story())


def test_a_hundred_nodes_at_once_get_a_hundred_prefixes(etcd: EtcdServer) -> None:
    async def story() -> None:
        sources = [
            EtcdSource(node_config(etcd, number, cidr="10.42.0.0/17", lease_seconds=60))
            for number in range(1, 101)
        ]
        prefixes = await asyncio.gather(*(source.own_prefixes() for source in sources))
        assert len(set(prefixes)) == 100
        for source in sources:
            await source.close()

    asyncio.run(story())


def test_a_node_that_dies_is_forgotten_and_its_prefix_withheld_then_free(etcd: EtcdServer) -> None:
    """The pool holds two prefixes, and both are taken."""
    cidr = "10.42.0.0/23"

    async def story() -> None:
        async with following(node_config(etcd, 1, cidr=cidr)) as (one,):
            two = await Follower(node_config(etcd, 2, cidr=cidr)).start()
            await eventually(lambda: one.ids == {"n2"}, "the second node")
            await two.stop()
            died = time.monotonic()
            heir = asyncio.create_task(Follower(node_config(etcd, 3, cidr=cidr)).start())
            await eventually(lambda: one.ids == set(), "the dead node's departure", 8)
            assert not heir.done(), "the prefix was given away before its time"
            third = await heir
            assert time.monotonic() - died >= 6 - 2  # a renewal may have been up to a third of it before
            assert third.prefixes == two.prefixes
            await eventually(lambda: one.ids == {"n3"}, "the heir")
            await third.stop()

    asyncio.run(story())


def test_a_node_that_was_cut_off_too_long_never_takes_its_prefix_back(etcd: EtcdServer) -> None:
    """Its claim lapsed and another has the prefix: there is one owner, and the loser says so."""

    async def story() -> None:
        given = 'prefixes = ["10.42.7.0/24"]'
        async with following(node_config(etcd, 1, node=given)) as (loser,):
            await eventually(lambda: loser.unannounced is None, "the claim")
            urls = loser.source._client._urls
            loser.source._client._urls = ("http://127.0.0.1:1",)
            await eventually(lambda: loser.unannounced is not None, "fencing", 8)
            async with following(node_config(etcd, 2, node=given)) as (owner,):
                await eventually(lambda: owner.unannounced is None, "the claim's lapse", 12)
                loser.source._client._urls = urls
                await eventually(lambda: "n2 has 10.42.7.0/24" in str(loser.unannounced), "the loser's word")
                await eventually(lambda: loser.ids == {"n2"}, "the owner")
                assert owner.ids == set()
                assert owner.unannounced is None
                assert (loser.fenced, owner.fenced) == (True, False)
                leases = etcd.ctl("lease", "list").split()[3:]
                assert len(leases) <= 6, "tries leave no leases behind"
                claim = etcd.ctl("get", "--print-value-only", "/podloom/prefixes/10.42.7.0-24")
                assert claim == "n2\n"
                etcd.stop()
                await eventually(lambda: loser.fault is not None, "another absence")
                await asyncio.sleep(0.5)  # some tries
                assert loser.fenced, "what is another's does not become ours by not asking"

    asyncio.run(story())


def test_a_node_that_moves_says_so_at_once(etcd: EtcdServer) -> None:
    """It keeps its prefix, and its record of before is nobody else's for it."""

    async def story() -> None:
        one, two = (node_config(etcd, number, lease_seconds=30) for number in (1, 2))
        async with following(one, two) as (mover, other):
            await eventually(lambda: mover.unannounced is None, "the announcement")
            await eventually(lambda: "nodes/n1" in other.said, "the node")
            for number in (101, 102):
                endpoints = (ip_address(f"192.0.2.{number}"),)
                moved = replace(one, node=replace(one.node, endpoints=endpoints))
                mover.source.relocate(moved)
                await eventually(
                    lambda endpoints=endpoints: other.said["nodes/n1"].endpoints == endpoints, "the news", 3.0
                )
            assert other.said["nodes/n1"].prefixes == mover.prefixes
            assert mover.unannounced is None
            announced = other.said["nodes/n1"]
            # While it tells of one move it makes the next.
            for number in (103, 104, 105):
                endpoints = (ip_address(f"192.0.2.{number}"),)
                mover.source.relocate(replace(one, node=replace(one.node, endpoints=endpoints)))
                await asyncio.sleep(0.002)
            await eventually(
                lambda: other.said["nodes/n1"] == replace(announced, endpoints=endpoints), "the last", 3.0
            )

    asyncio.run(story())


def test_a_reserved_prefix_is_nobodys(etcd: EtcdServer) -> None:
    etcd.ctl("put", "/podloom/prefixes/10.42.0.0-24", "the office's printers")

    async def story() -> None:
        async with following(node_config(etcd, 1, cidr="10.42.0.0/23")) as (one,):
            assert one.prefixes == (ip_network("10.42.1.0/24"),)

    asyncio.run(story())


def test_prefixes_given_by_hand_are_claimed_and_never_taken_from_another(etcd: EtcdServer) -> None:
    async def story() -> None:
        owner = node_config(etcd, 1, node='prefixes = ["10.42.8.0/22"]')
        rival = node_config(etcd, 2, node='prefixes = ["10.42.9.0/24"]')
        async with following(owner) as (one,):
            await eventually(lambda: one.unannounced is None, "the claim")
            async with following(rival) as (two,):
                await eventually(lambda: "n1 has 10.42.8.0/22" in str(two.unannounced), "the refusal")
                await eventually(lambda: two.ids == {"n1"}, "the owner")
                assert one.ids == set()

    asyncio.run(story())


def test_a_clone_is_refused_and_says_so(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        original = node_config(etcd, 1)
        cloned = config.parse(config.render(original).replace("192.0.2.1", "192.0.2.77"))
        async with following(original) as (one,):
            await eventually(lambda: one.unannounced is None, "the registration")
            clone = EtcdSource(cloned, stored_prefixes=one.prefixes)
            starting = asyncio.create_task(clone.own_prefixes())
            await eventually(lambda: "the node id n1 is in use at 192.0.2.1" in caplog.text, "its refusal")
            assert not starting.done()
            starting.cancel()
            await asyncio.wait([starting])
            await clone.close()
            assert one.unannounced is None
            text = json.loads(etcd.ctl("get", "--print-value-only", "/podloom/nodes/n1"))
            assert text["endpoints"] == ["192.0.2.1"]

    asyncio.run(story())


JUNK: list[tuple[str, str, str]] = [
    ("nodes/x", "\x01\x02 junk", "must be JSON"),
    ("nodes/x", "[]", "must be a JSON object"),
    ("nodes/x", "[" * 30_000, "must be JSON"),
    ("nodes/x", '{"id": "x"}', "nodes/x.endpoints is missing"),
    (
        "nodes/x",
        '{"id": "y", "endpoints": ["192.0.2.9"], "prefixes": ["10.42.9.0/24"], "port": 1, "vni": 1,'
        ' "encapsulation": "geneve", "router_mac": "02:00:00:00:00:01"}',
        "must be the key's own",
    ),
    ("nodes/x", '{"id": "x", "endpoints": 7, "port": true}', "nodes/x.port = true"),
]


def test_faulty_records_are_refused_with_their_key_and_the_rest_applies(etcd: EtcdServer) -> None:
    async def story() -> None:
        async with following(node_config(etcd, 1), node_config(etcd, 2)) as (one, _):
            await eventually(lambda: one.ids == {"n2"}, "the second node")
            for key, value, why in JUNK:
                etcd.ctl("put", f"/podloom/{key}", value)
                await eventually(
                    lambda why=why: (
                        isinstance(one.said.get("nodes/x"), Refusal)
                        and any(why in str(fault) for fault in one.said["nodes/x"].faults)
                    ),
                    why,
                )
                assert one.ids == {"n2"}
            etcd.ctl("del", "/podloom/nodes/x")
            await eventually(lambda: "nodes/x" not in one.said, "its departure")

    asyncio.run(story())


def record_of(node_id: str, endpoint: str, prefix: str, **more: Any) -> str:
    """A record's value, as its node would put it."""
    record = {"id": node_id, "endpoints": [endpoint], "prefixes": [prefix], "port": 6081, "vni": 1}
    more = {"encapsulation": "geneve", "router_mac": format_mac(derive_mac(node_id, "router")), **more}
    return json.dumps(record | more)


@pytest.mark.slow
def test_a_hundred_thousand_records_keep_nobody_waiting(etcd: EtcdServer) -> None:
    """Most of them are junk or others' prefixes. What is sound stands, and packets, whose loop this would be,
    do not wait while it is read."""
    count, ticks = 100_000, list[float]()

    def value(number: int) -> bytes:
        if number % 2:
            return bytes([0xFF, number & 255]) * 100
        endpoint = str(ip_address("198.18.0.0") + number)
        return record_of(f"k{number}", endpoint, "10.42.9.0/24").encode()

    async def fill(client: EtcdClient) -> None:
        for start in range(0, count, 128):
            numbers = range(start, min(start + 128, count))
            assert await client.commit([], [Put(f"/podloom/nodes/k{n}", value(n), 0) for n in numbers])

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.001)

    async def story() -> None:
        settings = node_config(etcd, 1, lease_seconds=60)
        client = open_client(settings.discovery)
        await fill(client)
        await client.close()
        ticking = asyncio.create_task(tick())
        began = time.monotonic()
        async with following(settings) as (one,):
            await eventually(lambda: len(one.said) == count, "all of them", 120)
            took = time.monotonic() - began
            await eventually(lambda: one.unannounced is None, "the registration", 30)
            registry = Registry(settings.local, 10_000)
            with many_objects():
                stands = await asyncio.to_thread(registry.replace, one.said)
            assert len(stands) == 1
            longest = max(after - before for before, after in pairwise(ticks))
            assert sum(1 for _ in registry.faults) == count - 1
        ticking.cancel()
        print(f"{count} records in {took:.1f} s, the longest wait {longest * 1e3:.0f} ms")  # noqa: T201

    asyncio.run(story())


def test_the_main_files_peers_stand_where_etcd_says_otherwise(etcd: EtcdServer) -> None:
    written = """
[[peer]]
id = "n2"
endpoints = ["192.0.2.2"]
prefixes = ["10.42.2.0/24"]
"""
    settings = identify(config.parse(config.render(node_config(etcd, 1)) + written))
    etcd.ctl("put", "/podloom/nodes/n2", record_of("n2", "192.0.2.66", "10.42.6.0/24"))

    async def story() -> None:
        async with following(settings) as (one,):
            await eventually(lambda: len(one.said) == 2, "both")
            registry = Registry(settings.local, 100)
            registry.replace(one.said)
            assert list(registry.records.values()) == list(settings.peers)
            (fault,) = registry.faults
            assert str(fault) == 'nodes/n2.id = "n2": must be unique; the main file\'s peer[0] has it'

    asyncio.run(story())


def test_a_newer_podlooms_keys_are_left_alone(etcd: EtcdServer) -> None:
    etcd.ctl("put", "/podloom/nodes/new", record_of("new", "192.0.2.9", "10.42.9.0/24", quantum=True))

    async def story() -> None:
        async with following(node_config(etcd, 1)) as (one,):
            await eventually(lambda: one.ids == {"new"}, "the newer node")

    asyncio.run(story())


def test_a_stopped_server_is_no_reason_to_forget(etcd: EtcdServer) -> None:
    """What changed while it was away is known soon after it is back; all is read anew only if that was
    compacted."""
    ghost = record_of("ghost", "192.0.2.9", "10.42.9.0/24")

    async def story() -> None:
        async with following(node_config(etcd, 1), node_config(etcd, 2)) as (one, _):
            await eventually(lambda: one.ids == {"n2"}, "the second node")
            for compacted in (False, True):
                heard = len(one.items)
                etcd.stop()
                await eventually(lambda: one.fault is not None, "the trouble")
                assert one.ids >= {"n2"}
                etcd.start(hidden=True)
                if not compacted:
                    etcd.ctl("put", "/podloom/nodes/ghost", ghost)
                else:
                    etcd.ctl("del", "/podloom/nodes/ghost")
                    revision = json.loads(etcd.ctl("put", "/elsewhere", "x", "-w", "json"))["header"][
                        "revision"
                    ]
                    etcd.ctl("compaction", str(revision))
                etcd.stop()
                etcd.start()
                expected = {"n2"} if compacted else {"n2", "ghost"}
                await eventually(
                    lambda expected=expected: one.fault is None and one.ids == expected, "all of it"
                )
                listed = any(isinstance(item, Snapshot) for item in one.items[heard:])
                assert listed == compacted

    asyncio.run(story())


def test_a_server_that_only_keeps_its_connections_is_noticed(etcd: EtcdServer) -> None:
    """Half open: no answer and no reset. A watch that is silent is opened anew."""

    async def story() -> None:
        async with following(node_config(etcd, 1), silence_seconds=1.0) as (one,):
            await eventually(lambda: one.unannounced is None, "the start")
            etcd.freeze()
            await eventually(lambda: one.unannounced is not None, "fencing", 15)
            etcd.thaw()
            await eventually(lambda: one.unannounced is None, "recovery", 15)
            async with following(node_config(etcd, 2)):
                await eventually(lambda: one.ids == {"n2"}, "what happens afterwards")

    asyncio.run(story())


def test_ten_minutes_without_the_server_are_few_requests_and_two_words(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said once is not said again, peers stay, and nobody asks more than once a second. Then the
    prefix may be another's, and no pod is to get an address of it."""
    asked = 0
    original = EtcdClient._post

    async def counted(self: EtcdClient, *words: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        return await original(self, *words, **more)

    async def story() -> None:
        time = VirtualTime()
        options = {"clock": time.clock, "sleep": time.sleep}
        settings = node_config(etcd, 1, lease_seconds=60)
        settings = replace(settings, discovery=replace(settings.discovery, hold_seconds=900))
        etcd.ctl("put", "/podloom/nodes/n2", record_of("n2", "192.0.2.2", "10.42.2.0/24"))
        async with following(settings, **options) as (one,):
            await eventually(lambda: one.ids == {"n2"} and one.unannounced is None, "the start")
            heard = len(one.items)
            etcd.stop()
            await eventually(lambda: one.fault is not None, "the trouble")
            monkeypatch.setattr(EtcdClient, "_post", counted)
            await time.go_on(59.9, sleepers=3)
            assert one.unannounced is None
            await time.go_on(0.2, sleepers=3)
            await eventually(lambda: one.unannounced is not None, "the word that the lease has run out")
            await time.go_on(539.9, sleepers=3)
            print(f"{asked / 600:.2f} requests a second")  # noqa: T201
            assert 0.2 < asked / 600 < 1.0
            assert [type(item) for item in one.items[heard:]] == [Trouble, Announced]
            assert one.items[-1] == Announced(one.unannounced, fenced=False)
            assert one.ids == {"n2"}
            await time.go_on(400, sleepers=3)
            assert one.items[-1] == Announced(one.unannounced, fenced=True)
            assert "its prefixes may be another's" in str(one.unannounced)
            assert len(one.items) == heard + 3
            assert one.ids == {"n2"}

    asyncio.run(story())


def test_a_record_that_somebody_deletes_is_put_again(etcd: EtcdServer) -> None:
    async def story() -> None:
        async with following(node_config(etcd, 1), node_config(etcd, 2)) as (one, two):
            await eventually(lambda: one.ids == {"n2"}, "the second node")
            for _ in range(3):
                etcd.ctl("del", "/podloom/nodes/n2")
                await eventually(lambda: one.items[-1] == Remove("nodes/n2") or one.ids == {"n2"}, "it")
                await eventually(lambda: one.ids == {"n2"} and two.unannounced is None, "its return")

    asyncio.run(story())


def test_a_start_without_the_server_has_the_prefixes_of_last_time(etcd: EtcdServer) -> None:
    etcd.stop()
    stored = (ip_network("10.42.7.0/24"),)

    async def story() -> None:
        async with following(node_config(etcd, 1), stored_prefixes=stored) as (one,):
            assert one.prefixes == stored
            await eventually(lambda: isinstance(one.fault, str) and etcd.url in one.fault, "the trouble")
            etcd.start()
            await eventually(lambda: one.fault is None and one.unannounced is None, "the server", 20)
            claims = etcd.ctl("get", "--prefix", "--keys-only", "/podloom/prefixes/")
            assert claims.split() == ["/podloom/prefixes/10.42.7.0-24"]

    asyncio.run(story())


def test_users_and_their_tokens(etcd: EtcdServer, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret\n")
    for words in (
        ("user", "add", "root:r"),
        ("user", "grant-role", "root", "root"),
        ("role", "add", "podloom"),
        ("role", "grant-permission", "--prefix=true", "podloom", "readwrite", "/podloom/"),
        ("user", "add", "loom:secret"),
        ("user", "grant-role", "loom", "podloom"),
        ("auth", "enable"),
    ):
        etcd.ctl(*words)

    async def story() -> None:
        user = f'username = "loom"\npassword_file = "{password}"'
        async with following(node_config(etcd, 1, discovery=user)) as (one,):
            await eventually(lambda: one.unannounced is None and one.fault is None, "the start")
            one.source._client._token = "stale"  # noqa: S105
            await one.source._client.list("/podloom/")
            assert one.unannounced is None
        stranger = EtcdSource(node_config(etcd, 2))
        with pytest.raises(EtcdError, match="user name is empty"):
            await stranger._registration.register()
        await stranger.close()

    asyncio.run(story())


def test_tls_with_certificates_on_both_sides(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    server = EtcdServer(tmp_path / "etcd", tls=tmp_path)
    tls = f'''
ca_file = "{tmp_path}/ca.crt"
cert_file = "{tmp_path}/it.crt"
key_file = "{tmp_path}/it.key"'''

    async def story() -> None:
        async with following(node_config(server, 1, discovery=tls)) as (one,):
            await eventually(lambda: one.unannounced is None and one.fault is None, "the start")
        stranger = EtcdSource(node_config(server, 2, discovery=f'ca_file = "{tmp_path}/ca.crt"'))
        with pytest.raises(EtcdError, match=r"certificate required|alert|disconnected|reset"):
            await stranger._registration.register()
        await stranger.close()
        duped = EtcdSource(node_config(server, 2))
        with pytest.raises(EtcdError, match="certificate verify failed"):
            await duped._registration.register()
        await duped.close()

    try:
        server.start()
        asyncio.run(story())
    finally:
        server.close()


def make_certificates(directory: Path) -> None:
    """An authority, and one certificate by it for a server on loopback and its client."""
    extensions = directory / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for words in (
        ("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca", "-days", "2"),
        ("req", *curve, "-keyout", "it.key", "-out", "it.csr", "-subj", "/CN=it"),
        (
            *("x509", "-req", "-in", "it.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", "it.crt", "-days", "2", "-extfile", "extensions"),
        ),
    ):
        done = subprocess.run(["openssl", *words], cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def is_leader(member: EtcdServer) -> bool:
    status = json.loads(member.ctl("endpoint", "status", "-w", "json"))[0]["Status"]
    return bool(status["leader"] == status["header"]["member_id"])


def test_a_leader_that_dies_is_left_for_another_member(tmp_path: Path) -> None:
    """Of three members the leader is the one that is asked, and watched."""
    members = EtcdServer.cluster(tmp_path, 3)

    async def story() -> None:
        first, *rest = sorted(members, key=is_leader, reverse=True)
        urls = (first.url, *(member.url for member in rest))
        discovery = replace(node_config(first, 1).discovery, urls=urls)
        settings = [replace(node_config(first, number), discovery=discovery) for number in (1, 2, 3)]
        async with following(*settings[:2]) as (one, two):
            await eventually(lambda: one.ids == {"n2"} and two.ids == {"n1"}, "each other")
            first.stop()
            await eventually(lambda: one.source._client._url() != first.url, "another member", 15)
            await eventually(lambda: one.fault is None and one.unannounced is None, "recovery", 15)
            third = await Follower(settings[2]).start()
            await eventually(lambda: one.ids == {"n2", "n3"}, "what happens afterwards", 15)
            await third.stop()
            assert two.ids >= {"n1"}

    try:
        for member in members:
            member.launch()
        for member in members:
            member.wait_ready()
        asyncio.run(story())
    finally:
        for member in members:
            member.close()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "<html>",
        "[]",
        "{}",
        '{"header": 7, "ID": "x", "result": 7}',
        '{"header": {"revision": "x"}, "kvs": 7, "ID": "1"}',
        '{"header": {"revision": "1"}, "kvs": [{"key": "%"}], "ID": "1", "result": {"events": [7]}}',
        '{"error": 7, "code": "x"}',
        '{"error": {"message": 7}}',
    ],
)
def test_whatever_else_answers_in_etcds_place_is_trouble_and_no_more(answer: str) -> None:
    asked = 0

    async def reply(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(text=answer)

    async def story() -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", reply)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        text = f"""
[cluster]
cidrs = ["10.42.0.0/16"]
[node]
id = "n1"
endpoints = ["192.0.2.1"]
prefixes = ["10.42.1.0/24"]
[discovery]
source = "etcd"
urls = ["http://127.0.0.1:{port}"]
"""
        try:
            async with following(identify(config.parse(text))) as (one,):
                await eventually(lambda: str(port) in str(one.fault), "the trouble")
                await eventually(lambda: str(port) in str(one.unannounced), "that we are not announced")
        finally:
            await runner.cleanup()

    asyncio.run(story())
    assert asked < 30


def test_the_configuration_shown_is_the_one_meant(etcd: EtcdServer) -> None:
    settings = node_config(etcd, 1)
    assert config.parse(config.render(settings)) == settings
    given = with_prefixes(settings, (ip_network("10.42.7.0/24"),))
    assert config.parse(config.render(given)) == given
