"""Asks other resolvers. Nothing a stranger sends from elsewhere is taken for their reply.

A reply must come from the address and port asked (a connected socket sees to it), to a port that is new for
each query, with its random id and the random case of its letters (RFC 5452 section 9).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import dns.message
import dns.name
import dns.rcode

from forwarder.addresses import Address
from forwarder.names.servers import Server, parse_resolv_conf
from forwarder.names.wire import (
    MAX_MESSAGE_BYTES,
    Match,
    Question,
    keep_relevant,
    match,
    parse_reply,
    upstream_query,
)

TRY_SECONDS: Final = 1.2
DEADLINE_SECONDS: Final = 4.5
"""A client's C library gives up after five seconds."""

ROUNDS: Final = 2
MAX_STRAYS: Final = 8
"""Datagrams that are not the reply: after so many somebody is guessing, and TCP cannot be guessed."""

_GOOD: Final = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)

log = logging.getLogger("podloom.names")


class UpstreamError(Exception):
    """No server gave a reply in time."""


class _AskOverTcpError(Exception):
    """This reply cannot be had over UDP."""


class HostServers:
    """Those of the host's resolv.conf, which is read again when it changes."""

    CHECK_SECONDS: Final = 5.0

    def __init__(self, path: Path, own: Sequence[Address], clock: Callable[[], float]) -> None:
        """`own` addresses are left out: asking ourselves would go round for ever."""
        self._path = path
        self._own = frozenset(own)
        self._clock = clock
        self._checked_at = float("-inf")
        self._modified_ns: int | None = None
        self._servers: tuple[Server, ...] = ()

    def __call__(self) -> tuple[Server, ...]:
        if self._clock() - self._checked_at >= self.CHECK_SECONDS:
            self._checked_at = self._clock()
            try:
                modified_ns = self._path.stat().st_mtime_ns
                if modified_ns != self._modified_ns:
                    servers = parse_resolv_conf(self._path.read_text(errors="replace"))
                    self._servers = tuple(one for one in servers if one.address not in self._own)
                    self._modified_ns = modified_ns
            except OSError as error:
                if self._modified_ns is not None:
                    log.warning("%s cannot be read, its servers stay: %s", self._path, error.strerror)
                self._modified_ns = None
        return self._servers


class Upstream:
    """The servers as one: the last that answered is asked first, the next when it does not."""

    def __init__(self, servers: Callable[[], Sequence[Server]]) -> None:
        self.servers = servers
        self._preferred: Server | None = None

    async def ask(self, question: Question) -> dns.message.Message:
        """The reply, without what does not belong to the question. UpstreamError if there is none."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_SECONDS
        waiting = sorted(self.servers(), key=lambda server: server != self._preferred)
        failure: dns.message.Message | None = None
        for _ in range(ROUNDS):
            for server in tuple(waiting):
                until = min(loop.time() + TRY_SECONDS, deadline)
                try:
                    async with asyncio.timeout_at(until):
                        message = await _ask_server(server, question)
                except (OSError, EOFError, ValueError):
                    continue  # TimeoutError is an OSError.
                if message.rcode() in _GOOD:
                    self._preferred = server
                    return keep_relevant(message, question)
                failure = message
                waiting.remove(server)
        if failure is not None:
            return keep_relevant(failure, question)
        raise UpstreamError(f"none of {len(self.servers())} servers answered")


async def _ask_server(server: Server, question: Question) -> dns.message.Message:
    message = await _exchange(server, question, edns=True)
    if message.rcode() == dns.rcode.FORMERR:
        message = await _exchange(server, question, edns=False)  # RFC 6891 section 7
    return message


async def _exchange(server: Server, question: Question, *, edns: bool) -> dns.message.Message:
    name = random_case(question.name)
    query = upstream_query(question, secrets.randbits(16), name, edns=edns)
    question_bytes = sum(len(label) + 1 for label in name.labels) + 4
    try:
        reply = await _over_udp(server, query, question_bytes)
    except _AskOverTcpError:
        reply = await _over_tcp(server, query, question_bytes)
    return parse_reply(reply)


async def _over_udp(server: Server, query: bytes, question_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    replied: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Exchange(query, question_bytes, replied), remote_addr=(str(server.address), server.port)
    )
    try:
        transport.sendto(query)
        return await replied
    finally:
        transport.close()


class _Exchange(asyncio.DatagramProtocol):
    """Waits for the reply to one query."""

    def __init__(self, query: bytes, question_bytes: int, replied: asyncio.Future[bytes]) -> None:
        self._query = query
        self._question_bytes = question_bytes
        self._replied = replied
        self._strays = 0

    def datagram_received(self, data: bytes, _sender: object) -> None:
        if self._replied.done():
            return
        matched = match(self._query, self._question_bytes, data)
        if matched is Match.NONE:
            self._strays += 1
            if self._strays < MAX_STRAYS:
                return
        # Some servers answer in letters of their own choice. So may somebody who guessed the id.
        if matched in (Match.NONE, Match.CASE) or data[2] & 0x02:
            self._replied.set_exception(_AskOverTcpError())
        else:
            self._replied.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self._replied.done():
            self._replied.set_exception(exc)


async def _over_tcp(server: Server, query: bytes, question_bytes: int) -> bytes:
    reader, writer = await asyncio.open_connection(str(server.address), server.port, limit=MAX_MESSAGE_BYTES)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        size = int.from_bytes(await reader.readexactly(2), "big")
        reply = await reader.readexactly(size)
    finally:
        writer.close()
    if match(query, question_bytes, reply) is Match.NONE:
        raise ValueError("the reply is to another question")
    return reply


def random_case(name: dns.name.Name) -> dns.name.Name:
    """The name with each letter's case thrown (draft-vixie-dnsext-dns0x20)."""
    bits = secrets.randbits(8 * 32)
    labels = []
    for label in name.labels:
        spelled = bytearray(label.lower())
        for index, byte in enumerate(spelled):
            if 0x61 <= byte <= 0x7A:
                spelled[index] = byte & ~0x20 if bits & 1 else byte
                bits >>= 1
        labels.append(bytes(spelled))
    return dns.name.Name(labels)
