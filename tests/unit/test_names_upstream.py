"""Upstream servers that behave and that do not, on the loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from forwarder.names import upstream
from forwarder.names.servers import Server, parse_resolv_conf, parse_server
from forwarder.names.upstream import HostServers, Upstream, UpstreamError, random_case
from forwarder.names.wire import Match, Question, match

LOOPBACK = ip_address("127.0.0.1")
QUESTION = Question(dns.name.from_text("www.example.com"), dns.rdatatype.A)

Script = Callable[[bytes], Sequence[bytes]]


def answered(query: bytes, value: str = "192.0.2.80") -> bytes:
    message = dns.message.from_wire(query)
    reply = dns.message.make_response(message, recursion_available=True)
    reply.answer.append(dns.rrset.from_text(message.question[0].name, 60, "IN", "A", value))
    return reply.to_wire()


def failed(query: bytes, rcode: dns.rcode.Rcode) -> bytes:
    reply = dns.message.make_response(dns.message.from_wire(query))
    reply.set_rcode(rcode)
    return reply.to_wire()


class Scripted:
    """A server whose replies to one datagram, and over one connection, are a function of the query."""

    def __init__(self, over_udp: Script, over_tcp: Script | None = None) -> None:
        self._over_udp = over_udp
        self._over_tcp = over_tcp
        self.queries: list[bytes] = []
        self.senders: list[int] = []
        self.connections = 0

    async def open(self, stack: AsyncExitStack) -> Server:
        script = self

        class Protocol(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, sender: Any) -> None:
                script.queries.append(data)
                script.senders.append(sender[1])
                for reply in script._over_udp(data):
                    self.transport.sendto(reply, sender)

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Protocol, local_addr=("127.0.0.1", 0)
        )
        stack.callback(transport.close)
        port = transport.get_extra_info("sockname")[1]
        if self._over_tcp is not None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", port)
            stack.callback(server.close)
        return Server(LOOPBACK, port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._over_tcp is not None
        self.connections += 1
        data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        for reply in self._over_tcp(data):
            writer.write(len(reply).to_bytes(2, "big") + reply)
        writer.close()


def ask(*servers: Scripted, question: Question = QUESTION) -> dns.message.Message:
    """What upstream makes of these servers."""

    async def story() -> dns.message.Message:
        async with AsyncExitStack() as stack:
            listening = [await server.open(stack) for server in servers]
            return await Upstream(lambda: listening).ask(question)

    return asyncio.run(story())


def values(message: dns.message.Message) -> list[str]:
    return [str(rdata) for rrset in message.answer for rdata in rrset]


@pytest.fixture(autouse=True)
def short_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "TRY_SECONDS", 0.3)


def test_a_query_is_answered() -> None:
    server = Scripted(lambda query: [answered(query)])
    assert values(ask(server)) == ["192.0.2.80"]
    (query,) = server.queries
    message = dns.message.from_wire(query)
    assert message.question[0].name == QUESTION.name
    assert (message.edns, message.payload) == (0, 1232)
    assert message.flags == dns.flags.RD


def test_ids_ports_and_letters_are_random() -> None:
    server = Scripted(lambda query: [answered(query)])

    async def story() -> None:
        async with AsyncExitStack() as stack:
            address = await server.open(stack)
            for _ in range(12):
                await Upstream(lambda: [address]).ask(QUESTION)

    asyncio.run(story())
    assert len({query[:2] for query in server.queries}) > 8
    assert len({query[12:29] for query in server.queries}) > 8
    assert len(set(server.senders)) > 8


def forged(query: bytes) -> list[bytes]:
    """Wrong in one thing each: id, opcode, QR, question, count of questions, length."""
    reply = answered(query, "192.0.2.66")
    return [
        bytes([reply[0] ^ 1]) + reply[1:],
        reply[:2] + bytes([reply[2] | 0x28]) + reply[3:],
        reply[:2] + bytes([reply[2] & 0x7F]) + reply[3:],
        reply.replace(query[12:29], b"\x03www\x07evil000\x03com\x00"),
        reply[:4] + b"\0\2" + reply[6:],
        reply[:11],
    ]


def test_what_is_not_the_reply_is_passed_over() -> None:
    server = Scripted(lambda query: [*forged(query), answered(query)])
    assert values(ask(server)) == ["192.0.2.80"]


def test_who_guesses_is_left_for_tcp() -> None:
    flood = Scripted(
        lambda query: [*forged(query), *forged(query), answered(query, "192.0.2.66")],
        lambda query: [answered(query)],
    )
    assert values(ask(flood)) == ["192.0.2.80"]
    assert flood.connections == 1


def test_a_reply_from_another_port_is_not_heard() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            liar, _ = await loop.create_datagram_endpoint(
                asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
            )
            stack.callback(liar.close)

            def lie(query: bytes) -> list[bytes]:
                liar.sendto(answered(query, "192.0.2.66"), ("127.0.0.1", server.senders[-1]))
                return [answered(query)]

            server = Scripted(lie)
            address = await server.open(stack)
            assert values(await Upstream(lambda: [address]).ask(QUESTION)) == ["192.0.2.80"]

    asyncio.run(story())


def test_a_truncated_reply_is_asked_again_over_tcp() -> None:
    server = Scripted(
        lambda query: [query[:2] + b"\x87\x80" + query[4:6] + b"\0\0\0\0\0\0" + query[12:33]],
        lambda query: [answered(query)],
    )
    assert values(ask(server)) == ["192.0.2.80"]
    assert server.connections == 1


def test_a_server_with_letters_of_its_own_is_asked_over_tcp() -> None:
    def lowered(query: bytes) -> list[bytes]:
        reply = answered(query)
        return [reply.replace(query[12:29], query[12:29].lower())]

    server = Scripted(lowered, lowered)
    assert values(ask(server)) == ["192.0.2.80"]
    assert server.connections == 1


def test_a_server_before_edns_is_asked_without_it() -> None:
    def old(query: bytes) -> list[bytes]:
        if dns.message.from_wire(query).edns >= 0:
            return [query[:2] + b"\x81\x81" + bytes(8)]
        return [answered(query)]

    server = Scripted(old)
    assert values(ask(server)) == ["192.0.2.80"]
    assert len(server.queries) == 2


@pytest.mark.parametrize(
    "first",
    [
        lambda query: [failed(query, dns.rcode.SERVFAIL)],
        lambda query: [failed(query, dns.rcode.REFUSED)],
        lambda query: [query[:2] + b"\x81\x82" + bytes(8)],
        lambda _: [],
        lambda query: [answered(query)[:-3]],
    ],
    ids=["SERVFAIL", "REFUSED", "no question", "silence", "cut"],
)
def test_the_next_server_is_asked(first: Script) -> None:
    assert values(ask(Scripted(first), Scripted(lambda query: [answered(query)]))) == ["192.0.2.80"]


def test_who_answered_is_asked_first() -> None:
    silent, good = Scripted(lambda _: []), Scripted(lambda query: [answered(query)])

    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = [await silent.open(stack), await good.open(stack)]
            both = Upstream(lambda: servers)
            for _ in range(3):
                await both.ask(QUESTION)

    asyncio.run(story())
    assert (len(silent.queries), len(good.queries)) == (1, 3)


def test_a_failure_of_all_is_told() -> None:
    server = Scripted(lambda query: [failed(query, dns.rcode.SERVFAIL)])
    assert ask(server).rcode() == dns.rcode.SERVFAIL
    assert len(server.queries) == 1


def test_silence_of_all_is_an_error() -> None:
    server = Scripted(lambda _: [])
    with pytest.raises(UpstreamError):
        ask(server)
    assert len(server.queries) == upstream.ROUNDS
    with pytest.raises(UpstreamError, match="none of 0 servers"):
        ask()


def test_a_port_nobody_listens_on_is_noticed_at_once() -> None:
    async def story() -> float:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            address = await Scripted(lambda _: []).open(stack)
        started_at = loop.time()
        with pytest.raises(UpstreamError):
            await Upstream(lambda: [address]).ask(QUESTION)
        return loop.time() - started_at

    assert asyncio.run(story()) < 0.3


def test_what_does_not_belong_is_dropped() -> None:
    def generous(query: bytes) -> list[bytes]:
        message = dns.message.from_wire(query)
        reply = dns.message.make_response(message)
        asked = message.question[0].name
        for owner, rdtype, value in (
            (asked, "CNAME", "a.example.net."),
            (dns.name.from_text("a.example.net"), "A", "192.0.2.1"),
            (dns.name.from_text("bank.example"), "A", "192.0.2.66"),
        ):
            reply.answer.append(dns.rrset.from_text(owner, 60, "IN", rdtype, value))
        reply.authority.append(dns.rrset.from_text("example.com.", 60, "IN", "NS", "evil.example."))
        reply.additional.append(dns.rrset.from_text("evil.example.", 60, "IN", "A", "192.0.2.66"))
        return [reply.to_wire()]

    message = ask(Scripted(generous))
    assert values(message) == ["a.example.net.", "192.0.2.1"]
    assert (message.authority, message.additional) == ([], [])


def test_flags_of_the_question_are_passed_on() -> None:
    server = Scripted(lambda query: [answered(query)])
    ask(server, question=QUESTION._replace(dnssec=True, checking_disabled=True))
    message = dns.message.from_wire(server.queries[0])
    assert message.flags & dns.flags.CD
    assert message.ednsflags & dns.flags.DO


def test_random_case_changes_letters_only() -> None:
    name = dns.name.from_text("a-1_\\200z.Example.COM")
    spellings = {random_case(name) for _ in range(50)}
    assert spellings == {name}
    assert len({spelling.to_text() for spelling in map(random_case, [name] * 50)}) > 10


def test_a_type_that_looks_like_a_letter_has_no_case() -> None:
    query = b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\1a\0" + b"\0\x41\0\1"
    reply = b"\0\1\x81\x80\0\1\0\0\0\0\0\0" + b"\1A\0" + b"\0\x61\0\1"
    assert match(query, 7, reply) is Match.NONE
    assert match(query, 7, reply[:-3] + b"\x41\0\1") is Match.CASE


def test_the_hosts_servers_are_followed(tmp_path: Path) -> None:
    path, now = tmp_path / "resolv.conf", 0.0
    servers = HostServers(path, [ip_address("10.42.1.1")], lambda: now)
    assert servers() == ()
    path.write_text("nameserver 10.42.1.1\nnameserver 192.0.2.53\nsearch example\n")
    assert servers() == (), "not looked at again so soon"
    now = HostServers.CHECK_SECONDS
    assert servers() == (Server(ip_address("192.0.2.53")),), "we do not ask ourselves"
    path.write_text("nameserver 2001:db8::53\n")
    os.utime(path, ns=(1, 1))
    now *= 2
    assert servers() == (Server(ip_address("2001:db8::53")),)
    path.unlink()
    now *= 2
    assert servers() == (Server(ip_address("2001:db8::53")),), "the last good ones stay"


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:53", "192.0.2.1"),
        ("192.0.2.1:5353", "192.0.2.1:5353"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:53", "2001:db8::1"),
        ("[2001:db8::1]:5353", "[2001:db8::1]:5353"),
    ],
)
def test_how_servers_are_written(text: str, server: str) -> None:
    assert str(parse_server(text)) == server
    assert parse_server(str(parse_server(text))) == parse_server(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "192.0.2.1:", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:\u0665", "1:2"),
        *("192.0.2.1:5:3", "[2001:db8::1]", "[192.0.2.1", "fe80::1%eth0", "224.0.0.1", "::", "0.0.0.0"),
    ],
)
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError):
        parse_server(text)


def test_resolv_conf() -> None:
    text = "# nameserver 192.0.2.9\nnameserver\t192.0.2.1 \nnameserver fe80::1%eth0\nnameserver\noptions x\n"
    text += "nameserver 2001:db8::1\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n"
    assert [str(server) for server in parse_resolv_conf(text)] == ["192.0.2.1", "2001:db8::1", "192.0.2.3"]
