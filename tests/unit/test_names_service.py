"""The resolver's process on the loopback: its sockets, its end, and what becomes of it when it is stuck."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import dns.message
import pytest

from forwarder.names import server, service
from forwarder.names.records import Put, Remove, Replace, Service
from forwarder.names.server import MAX_CONNECTIONS_OF_SOURCE, Streams, make_resolver
from forwarder.names.service import LINE_RECORDS, NamesError, NameService
from forwarder.names.settings import Settings

SETTINGS = Settings(
    domain="cluster.local",
    addresses=("127.0.0.1",),
    networks=(),
    clients=("127.0.0.0/8",),
    upstream=("127.0.0.1:9",),
    queries_per_second=10_000,
    cache_bytes=1 << 20,
)
WEB = Service("web", cluster_ips=(ip_address("10.43.0.10"),))
NAME = "web.default.svc.cluster.local"


def query(name: str = NAME) -> bytes:
    return dns.message.make_query(name, "A").to_wire()


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


async def read_reply(reader: asyncio.StreamReader) -> dns.message.Message:
    size = int.from_bytes(await reader.readexactly(2), "big")
    return dns.message.from_wire(await reader.readexactly(size))


async def ask(port: int, data: bytes) -> dns.message.Message:
    """Over UDP."""
    loop = asyncio.get_running_loop()
    replied: asyncio.Future[bytes] = loop.create_future()

    class Client(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _sender: object) -> None:
            replied.set_result(data)

    transport, _ = await loop.create_datagram_endpoint(Client, remote_addr=("127.0.0.1", port))
    try:
        transport.sendto(data)
        async with asyncio.timeout(10):
            return dns.message.from_wire(await replied)
    finally:
        transport.close()


def values(message: dns.message.Message) -> list[str]:
    return [str(rdata) for rrset in message.answer for rdata in rrset]


def free_port() -> int:
    """A port that neither UDP nor TCP uses on 127.0.0.1. Not of the kernel's choice: what it picks for one
    is of the range that clients of the other have theirs from."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, ephemeral), 100):
        with socket.socket(type=socket.SOCK_STREAM) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("a hundred ports were all taken")


@asynccontextmanager
async def running() -> AsyncIterator[NameService]:
    names = NameService(SETTINGS, port=free_port())
    names.apply("test", Replace((WEB,)))
    await names.start()
    try:
        yield names
    finally:
        await names.close()


def told(story: Callable[[NameService], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running() as names:
            await story(names)

    asyncio.run(run())


def child() -> int:
    """The process that answers, by its parent, ours."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for one in children:
            # Empty for a moment: exec closes descriptors, by which its parent knows that it worked, before
            # the new image has its arguments.
            if b"forwarder.names" in Path(f"/proc/{one}/cmdline").read_bytes():
                return int(one)
    raise AssertionError("no resolver among our children")


def test_changes_reach_the_process() -> None:
    async def story(names: NameService) -> None:
        assert values(await ask(names.port, query())) == ["10.43.0.10"]
        names.apply("test", Put((Service("web", cluster_ips=(ip_address("10.43.0.11"),)),)))
        assert (await names.ask(NAME))["records"][0]["value"] == "10.43.0.11"
        assert values(await ask(names.port, query())) == ["10.43.0.11"]
        names.apply("test", Remove((WEB.key,)))
        assert (await names.ask(NAME))["records"] == []

    told(story)


@pytest.mark.parametrize("kind", [Replace, Put])
def test_changes_of_many_records(kind: type[Replace] | type[Put]) -> None:
    """They go in parts, and what is asked afterwards is answered from all of them."""
    many = tuple(Service(f"s{number}", cluster_ips=WEB.cluster_ips) for number in range(3 * LINE_RECORDS + 1))

    async def story(names: NameService) -> None:
        names.apply("many", kind(many))
        names.apply("many", Put((WEB,)))
        shown = {record["name"].partition(".")[0] for record in (await names.ask())["records"]}
        assert {service.name for service in many} | {"web"} <= shown
        names.apply("many", Replace(many[:1]))
        names.apply("test", Replace(()))
        shown = {record["name"].partition(".")[0] for record in (await names.ask())["records"]}
        assert "s0" in shown
        assert not {"s1", "web", f"s{3 * LINE_RECORDS}"} & shown

    told(story)


def test_one_that_died_is_replaced_and_knows_all() -> None:
    async def story(names: NameService) -> None:
        names.apply("other", Put((Service("late", cluster_ips=(ip_address("10.43.0.12"),)),)))
        os.kill(child(), signal.SIGKILL)
        assert values(await ask(names.port, query())) == ["10.43.0.10"]
        assert values(await ask(names.port, query("late.default.svc.cluster.local"))) == ["10.43.0.12"]

    told(story)


def test_one_that_is_stuck_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(service, "ASK_SECONDS", 0.3)

    async def story(names: NameService) -> None:
        assert values(await ask(names.port, query())) == ["10.43.0.10"]
        os.kill(child(), signal.SIGSTOP)
        assert values(await ask(names.port, query())) == ["10.43.0.10"]

    told(story)


def test_nobody_answers_for_one_that_is_not_there() -> None:
    async def story(names: NameService) -> None:
        os.kill(child(), signal.SIGKILL)
        with pytest.raises(NamesError, match="started again"):
            await names.ask()

    told(story)


def test_it_ends_with_its_parent() -> None:
    pids = []

    async def story(_: NameService) -> None:
        pids.append(child())

    told(story)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_connection_takes_many_queries_at_once() -> None:
    async def story(names: NameService) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", names.port)
        writer.write(framed(query()) + framed(query("absent.default.svc.cluster.local")) + framed(query()))
        assert values(await read_reply(reader)) == ["10.43.0.10"]
        assert values(await read_reply(reader)) == []
        assert values(await read_reply(reader)) == ["10.43.0.10"]
        writer.close()

    told(story)


@pytest.mark.parametrize(
    "data", [framed(b""), framed(b"junk"), framed(query()[:2] + b"\x81\x80" + query()[4:])]
)
def test_what_gets_no_reply_ends_the_connection(data: bytes) -> None:
    async def story(names: NameService) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", names.port)
        writer.write(data)
        assert await reader.read() == b""
        writer.close()
        assert values(await ask(names.port, query())) == ["10.43.0.10"]

    told(story)


def test_connections_of_one_source_are_bounded() -> None:
    async def story(names: NameService) -> None:
        held = [
            await asyncio.open_connection("127.0.0.1", names.port) for _ in range(MAX_CONNECTIONS_OF_SOURCE)
        ]
        for reader, writer in held:  # each is being served
            writer.write(framed(query()))
            await read_reply(reader)
        reader, writer = await asyncio.open_connection("127.0.0.1", names.port)
        assert await reader.read() == b""
        writer.close()
        for _, writer in held:
            writer.close()
        assert values(await ask(names.port, query())) == ["10.43.0.10"]

    told(story)


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)

    async def story() -> None:
        streams = Streams(make_resolver(SETTINGS))
        listening = await asyncio.start_server(streams.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(framed(query())[:5])  # and no more
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        listening.close()
        assert not streams._connections

    asyncio.run(story())


def test_a_taken_port_is_named() -> None:
    async def story() -> None:
        async with running() as names:
            with pytest.raises(NamesError, match=rf"127.0.0.1 UDP port {names.port}: Address already in use"):
                await NameService(SETTINGS, port=names.port).start()

    asyncio.run(story())
