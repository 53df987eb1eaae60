"""The resolver's process: sockets it is given, clients on them, and the daemon on a socket of its own.

The daemon writes JSON lines: first the Settings, then changes of records, the word to serve, and questions
about the resolver, each of which gets a line back. A change's records come in parts before it. When the
daemon is gone, so is this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import dns.rdata
import uvloop

from forwarder.names.limits import Limiter
from forwarder.names.records import from_json
from forwarder.names.resolver import Resolver
from forwarder.names.servers import parse_server
from forwarder.names.settings import MAX_LINE_BYTES, Settings
from forwarder.names.upstream import HostServers, Upstream
from forwarder.names.zone import NXDOMAIN, Zone

NOBODY: Final = 65534
MAX_CONNECTIONS: Final = 128
MAX_CONNECTIONS_OF_SOURCE: Final = 16
IDLE_SECONDS: Final = 10.0
"""How long a connection may be silent (RFC 7766 section 6.2.3), or its client not read."""

MAX_LISTED: Final = 100_000
LISTED_TYPES: Final = ("CNAME", "A", "AAAA", "SRV", "PTR", "TXT", "NS")
RESOLV_CONF: Final = Path("/etc/resolv.conf")

log = logging.getLogger("podloom.names")


def make_resolver(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Resolver:
    addresses = tuple(map(ip_address, settings.addresses))
    given = tuple(map(parse_server, settings.upstream))
    return Resolver(
        Zone(settings.domain, addresses, tuple(map(ip_network, settings.networks)), settings.expected),
        Limiter(tuple(map(ip_network, settings.clients)), settings.queries_per_second),
        Upstream((lambda: given) if given else HostServers(RESOLV_CONF, addresses, clock)),
        settings.cache_bytes,
        clock,
    )


class Datagrams(asyncio.DatagramProtocol):
    """Queries over UDP."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._replies: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, sender: Any) -> None:
        reply = self._resolver.receive(data, sender[0], time.monotonic(), over_tcp=False)
        if isinstance(reply, bytes):
            self._send(reply, sender)
        elif reply is not None:
            self._replies.add(task := asyncio.create_task(self._send_later(reply, sender)))
            task.add_done_callback(self._replies.discard)

    async def _send_later(self, reply: Any, sender: Any) -> None:
        if (data := await reply) is not None:
            self._send(data, sender)

    def _send(self, data: bytes, sender: Any) -> None:
        if self._transport is not None:
            self._transport.sendto(data, sender)

    def error_received(self, exc: Exception) -> None:
        log.debug("a client is gone: %s", exc)


class Streams:
    """Queries over TCP, answered one after the other."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._connections: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = writer.get_extra_info("peername")[0]
        self._connections[source] += 1
        try:
            if (
                self._connections.total() <= MAX_CONNECTIONS
                and self._connections[source] <= MAX_CONNECTIONS_OF_SOURCE
            ):
                await self._talk(reader, writer, source)
        except (OSError, EOFError):
            pass  # The client went away, or is too slow.
        finally:
            self._connections[source] -= 1
            if not self._connections[source]:
                del self._connections[source]
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str) -> None:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                size = int.from_bytes(await reader.readexactly(2), "big")
                data = await reader.readexactly(size)
            reply = self._resolver.receive(data, source, time.monotonic(), over_tcp=True)
            if reply is not None and not isinstance(reply, bytes):
                reply = await reply
            if reply is None:
                return  # Silence on a connection is its end.
            writer.write(len(reply).to_bytes(2, "big") + reply)
            async with asyncio.timeout(IDLE_SECONDS):
                await writer.drain()


def describe(resolver: Resolver, settings: Settings, asked: str | None) -> dict[str, Any]:
    """What `podloom names [NAME]` shows: all records, or what a name or address leads to."""
    zone = resolver.zone
    name = full_name(zone, asked) if asked is not None else None
    if name is None:
        records = zone.listing()
    else:
        found = [zone.look_up(name, rdtype) for rdtype in LISTED_TYPES]
        records = iter(dict.fromkeys(rr for one in found if one is not None for rr in one.answer))
    return {
        "domain": settings.domain,
        "addresses": list(settings.addresses),
        "upstream": list(map(str, resolver.upstream_servers())),
        "counters": dict(resolver.counters),
        "name": name,
        "ours": name is None or zone.look_up(name, "ANY") is not None,
        "records": [
            {"name": rr.owner, "type": rr.type, "ttl": rr.ttl, "value": rr.value}
            for rr in itertools.islice(records, MAX_LISTED)
        ],
    }


def full_name(zone: Zone, asked: str) -> str:
    """A name or address as the zone knows it. Without a final dot it may be meant below our domain."""
    try:
        return ip_address(asked).reverse_pointer
    except ValueError:
        name = asked.lower()
    below = zone.look_up(f"{name}.{zone.domain}", "ANY")
    if name.endswith(".") or below is None or below.rcode == NXDOMAIN:
        return name.removesuffix(".")
    return f"{name}.{zone.domain}"


async def serve(settings: Settings, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve until the daemon closes its end, and not before it said that we know all that it does: until
    then a name would seem not to exist, and clients would remember that."""
    resolver = make_resolver(settings)
    parts: list[Any] = []
    async with contextlib.AsyncExitStack() as stack:
        while line := await reader.readline():
            body = json.loads(line)
            if "serve" in body:
                await open_sockets(resolver, settings, stack)
            elif "part" in body:
                parts += body["part"]
            elif "source" in body:
                records, parts = parts, []
                change = from_json({name: value or records for name, value in body.items()})
                for refused in resolver.zone.apply(body["source"], change):
                    log.error("names of %s: not taken: %s", body["source"], refused)
                resolver.forget_repeats()
            else:
                answer = describe(resolver, settings, body["name"])
                writer.write(json.dumps({"answer": answer}).encode() + b"\n")
                await writer.drain()


async def open_sockets(resolver: Resolver, settings: Settings, stack: contextlib.AsyncExitStack) -> None:
    loop = asyncio.get_running_loop()
    for descriptor in settings.udp:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: Datagrams(resolver), sock=socket.socket(fileno=descriptor)
        )
        stack.callback(transport.close)
    streams = Streams(resolver)
    for descriptor in settings.tcp:
        server = await asyncio.start_server(streams.serve, sock=socket.socket(fileno=descriptor))
        stack.callback(server.close)


async def talk_with_daemon(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES)
    settings = Settings(**json.loads(await reader.readline()))
    drop_privileges()
    await serve(settings, reader, writer)
    writer.close()


def drop_privileges() -> None:
    """Root is not needed to answer; what pods send is read as nobody. All code is loaded by now."""
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="podloom: %(levelname)s: %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(talk_with_daemon(int(sys.argv[1])))
