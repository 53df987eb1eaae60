"""What the resolver makes of queries, byte for byte as a socket hands them over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.tsig
import pytest

from forwarder.names.limits import Limiter
from forwarder.names.records import Endpoint, Put, Replace, Service
from forwarder.names.resolver import (
    MAX_WAITING,
    MAX_WAITING_OF_SOURCE,
    REPEAT_SECONDS,
    ZONE_REPEAT_SECONDS,
    Resolver,
)
from forwarder.names.upstream import Upstream, UpstreamError
from forwarder.names.wire import UDP_PAYLOAD_BYTES, Question
from forwarder.names.zone import Zone
from tests.unit.test_names_zone import GATEWAYS, NETWORKS, RECORDS, SVC

POD = "10.42.1.5"
KUBERNETES = f"kubernetes.{SVC}"


class Known(Upstream):
    """Upstream as a function of the question, counted."""

    def __init__(self, answer: Callable[[Question], Awaitable[dns.message.Message]]) -> None:
        super().__init__(lambda: ())
        self._answer = answer
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> dns.message.Message:
        self.asked.append(question)
        return await self._answer(question)


def reply_to(question: Question, *texts: str, rcode: int = dns.rcode.NOERROR) -> dns.message.Message:
    """A reply whose records are "SECTION OWNER TTL TYPE VALUE", @ being the question's name."""
    query = dns.message.make_query(question.name, dns.rdatatype.RdataType.make(question.rdtype))
    reply = dns.message.make_response(query, recursion_available=True)
    reply.set_rcode(dns.rcode.Rcode(rcode))
    for text in texts:
        section, owner, ttl, rdtype, value = text.split(" ", 4)
        name = question.name if owner == "@" else dns.name.from_text(owner)
        rrset = dns.rrset.from_text(name, int(ttl), "IN", rdtype, value)
        getattr(reply, section).append(rrset)
    return reply


async def address(question: Question) -> dns.message.Message:
    return reply_to(question, "answer @ 60 A 192.0.2.80")


async def nothing(question: Question) -> dns.message.Message:
    soa = "authority example.com. 600 SOA a.example. b.example. 1 2 3 4 30"
    return reply_to(question, soa, rcode=dns.rcode.NXDOMAIN)


async def silence(question: Question) -> dns.message.Message:
    raise UpstreamError(f"nobody knows {question.name}")


class Desk:
    """A resolver, and a clock that stands still until it is set."""

    def __init__(self, answer: Callable[[Question], Awaitable[dns.message.Message]], rate: int) -> None:
        self.now = 1000.0
        self.upstream = Known(answer)
        zone = Zone("cluster.local", GATEWAYS, NETWORKS)
        zone.apply("test", Replace(RECORDS))
        limiter = Limiter((ip_network("10.42.1.0/24"),), rate)
        self.resolver = Resolver(zone, limiter, self.upstream, 1 << 20, lambda: self.now)

    def send(self, data: bytes, *, over_tcp: bool = False, source: str = POD) -> bytes | None:
        """The reply, waited for."""

        async def receive() -> bytes | None:
            reply = self.resolver.receive(data, source, self.now, over_tcp=over_tcp)
            return reply if reply is None or isinstance(reply, bytes) else await reply

        return asyncio.run(receive())

    def ask(
        self, name: str, rdtype: str = "A", *, over_tcp: bool = False, **more: Any
    ) -> dns.message.Message:
        query = dns.message.make_query(name, rdtype, **more)
        data = self.send(query.to_wire(), over_tcp=over_tcp)
        assert data is not None
        reply = dns.message.from_wire(data)
        assert query.is_response(reply)
        return reply


@pytest.fixture
def desk() -> Desk:
    return Desk(address, 10_000)


def values(reply: dns.message.Message) -> list[str]:
    return [str(rdata) for rrset in reply.answer for rdata in rrset]


def test_ours_are_authoritative_and_spelled_as_asked(desk: Desk) -> None:
    reply = desk.ask("KuberneTES.default.svc.CLUSTER.local")
    assert values(reply) == ["10.3.0.1"]
    assert reply.flags & dns.flags.AA
    assert reply.flags & dns.flags.RA
    assert reply.answer[0].name.to_text() == "KuberneTES.default.svc.CLUSTER.local."
    assert reply.question[0].name.to_text() == "KuberneTES.default.svc.CLUSTER.local."


def test_a_name_that_is_not_there(desk: Desk) -> None:
    reply = desk.ask(f"absent.{SVC}")
    assert (reply.rcode(), reply.answer) == (dns.rcode.NXDOMAIN, [])
    assert reply.authority[0].rdtype == dns.rdatatype.SOA
    assert desk.upstream.asked == []


def test_not_ours_comes_from_upstream_once(desk: Desk) -> None:
    assert values(desk.ask("www.example.com")) == ["192.0.2.80"]
    desk.now += 20.5
    reply = desk.ask("WWW.example.com")
    assert reply.answer[0].ttl == 40, "time has run down"
    assert reply.answer[0].name.to_text() == "WWW.example.com."
    assert not reply.flags & dns.flags.AA
    assert len(desk.upstream.asked) == 1
    desk.now += 40
    desk.ask("www.example.com")
    assert len(desk.upstream.asked) == 2


def test_negative_answers_are_kept_for_the_soas_time() -> None:
    desk = Desk(nothing, 1000)
    for _ in range(3):
        reply = desk.ask("absent.example.com")
        assert reply.rcode() == dns.rcode.NXDOMAIN
        assert reply.authority[0].rdtype == dns.rdatatype.SOA
        desk.now += 14
    assert len(desk.upstream.asked) == 1
    desk.ask("absent.example.com")
    assert len(desk.upstream.asked) == 2, "30 s: the SOA's minimum, below its TTL"


@pytest.mark.parametrize(
    ("texts", "rcode", "seconds"),
    [
        (("answer @ 60 A 192.0.2.1", "answer @ 60 A 192.0.2.2"), 0, 60),
        (("answer @ 60 CNAME b.", "answer b. 7 A 192.0.2.1"), 0, 7),
        (("answer @ 0 A 192.0.2.1",), 0, 0),
        (("answer @ 60 CNAME b.",), 0, 0),
        ((), 0, 0),
        ((), dns.rcode.NXDOMAIN, 0),
        ((), dns.rcode.REFUSED, 2),
        (("answer @ 9999999 A 192.0.2.1",), 0, 86400),
        (("authority com. 9999999 SOA a. b. 1 2 3 4 9999999",), 0, 3600),
    ],
    ids=[
        "shortest",
        "of a chain",
        "zero",
        "alias of nothing",
        "no data, no SOA",
        "no name, no SOA",
        "a failure",
        "at most a day",
        "negative: at most an hour",
    ],
)
def test_how_long_an_answer_is_kept(texts: tuple[str, ...], rcode: int, seconds: int) -> None:
    async def answer(question: Question) -> dns.message.Message:
        return reply_to(question, *texts, rcode=rcode)

    desk = Desk(answer, 1000)
    desk.ask("www.example.com")
    desk.now += max(seconds - 0.5, 0)
    desk.ask("www.example.com")
    assert len(desk.upstream.asked) == (1 if seconds else 2)
    desk.now += 1
    desk.ask("www.example.com")
    assert len(desk.upstream.asked) == (2 if seconds else 3)


def test_nobody_upstream_is_a_failure_that_is_remembered() -> None:
    desk = Desk(silence, 1000)
    for _ in range(2):
        assert desk.ask("www.example.com").rcode() == dns.rcode.SERVFAIL
    assert len(desk.upstream.asked) == 1
    assert values(desk.ask(KUBERNETES)) == ["10.3.0.1"], "ours go on"


def test_an_external_name_is_resolved(desk: Desk) -> None:
    reply = desk.ask(f"foo.{SVC}")
    assert values(reply) == ["www.example.com.", "192.0.2.80"]
    assert [one.name.to_text() for one in desk.upstream.asked] == ["www.example.com."]
    assert values(desk.ask(f"foo.{SVC}")) == ["www.example.com.", "192.0.2.80"]
    assert len(desk.upstream.asked) == 1


def test_a_loop_of_external_names_is_a_failure(desk: Desk) -> None:
    assert desk.ask(f"loop-a.{SVC}").rcode() == dns.rcode.SERVFAIL


def test_equal_questions_are_asked_once_at_a_time() -> None:
    release = asyncio.Event()

    async def later(question: Question) -> dns.message.Message:
        await release.wait()
        return await address(question)

    desk = Desk(later, 1000)

    async def story() -> None:
        nonlocal release
        release = asyncio.Event()
        queries = [dns.message.make_query("www.Example.com", "A") for _ in range(20)]
        waiting = [
            asyncio.create_task(desk.resolver.receive(query.to_wire(), POD, desk.now, over_tcp=False))  # type: ignore[arg-type]
            for query in queries
        ]
        await asyncio.sleep(0)
        release.set()
        for query, data in zip(queries, await asyncio.gather(*waiting), strict=True):
            assert data is not None
            assert query.is_response(dns.message.from_wire(data))

    asyncio.run(story())
    assert len(desk.upstream.asked) == 1


def test_what_waits_is_bounded() -> None:
    async def never(question: Question) -> dns.message.Message:
        await asyncio.Event().wait()
        raise AssertionError(question)

    desk = Desk(never, 10_000)

    async def story() -> None:
        waiting = []

        def send(number: int, source: str) -> bytes | None:
            data = dns.message.make_query(f"{number}.example.com", "A").to_wire()
            reply = desk.resolver.receive(data, source, desk.now, over_tcp=False)
            if reply is None or isinstance(reply, bytes):
                return reply
            waiting.append(asyncio.create_task(reply))
            return None

        for number in range(MAX_WAITING_OF_SOURCE):
            assert send(number, POD) is None
        await asyncio.sleep(0)
        refused = send(9999, POD)
        assert refused is not None
        assert dns.message.from_wire(refused).rcode() == dns.rcode.SERVFAIL
        for number in range(MAX_WAITING - MAX_WAITING_OF_SOURCE):
            assert send(number, f"10.42.1.{10 + number // MAX_WAITING_OF_SOURCE}") is None
        await asyncio.sleep(0)
        refused = send(9999, "10.42.1.200")
        assert refused is not None
        for task in (*waiting, *desk.resolver._asking.values()):
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not desk.resolver._waiting

    asyncio.run(story())


def test_the_same_bytes_again_are_not_read_again(desk: Desk) -> None:
    query = dns.message.make_query(KUBERNETES, "A", id=1).to_wire()
    first = desk.send(query)
    again = desk.send(b"\xab\xcd" + query[2:])
    assert first is not None
    assert again == b"\xab\xcd" + first[2:]
    assert desk.resolver.counters["repeated"] == 1
    desk.resolver.zone.apply("test", Put((Service("kubernetes", cluster_ips=(ip_address("10.3.0.99"),)),)))
    desk.resolver.forget_repeats()
    assert values(desk.ask(KUBERNETES)) == ["10.3.0.99"]
    desk.now += ZONE_REPEAT_SECONDS
    desk.send(query)
    assert desk.resolver.counters["repeated"] == 1


def test_the_same_bytes_for_upstream_are_read_again_after_a_second(desk: Desk) -> None:
    query = dns.message.make_query("www.example.com", "A").to_wire()
    for _ in range(3):  # asked of upstream, read from the cache, repeated
        desk.send(query)
    assert (desk.resolver.counters["cached"], desk.resolver.counters["repeated"]) == (1, 1)
    desk.now += REPEAT_SECONDS
    reply = desk.send(query)
    assert reply is not None
    assert dns.message.from_wire(reply).answer[0].ttl == 59
    assert (desk.resolver.counters["cached"], desk.resolver.counters["repeated"]) == (2, 1)


def header(reply: bytes | None) -> tuple[int, dns.rcode.Rcode]:
    """(id, rcode) of a reply that is a header or more."""
    assert reply is not None
    message = dns.message.from_wire(reply)
    assert message.flags & dns.flags.QR
    return message.id, message.rcode()


QUERY = dns.message.make_query(KUBERNETES, "A", id=7)
WIRE = QUERY.to_wire()


def counted(questions: int = 1, answers: int = 0, authorities: int = 0, additionals: int = 0) -> bytes:
    counts = (questions, answers, authorities, additionals)
    return WIRE[:4] + b"".join(count.to_bytes(2, "big") for count in counts) + WIRE[12:]


def other(name: str = KUBERNETES, rdtype: str = "A", rdclass: str = "IN", **more: Any) -> bytes:
    return dns.message.make_query(name, rdtype, rdclass, id=7, **more).to_wire()


@pytest.mark.parametrize(
    "data", [b"", WIRE[:11], WIRE[:2] + b"\x81\x80" + WIRE[4:]], ids=["", "short", "reply"]
)
def test_no_reply_at_all(desk: Desk, data: bytes) -> None:
    assert desk.send(data) is None
    assert desk.send(data, source="192.0.2.1") is None


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (WIRE[:2] + b"\x29\x00" + WIRE[4:], dns.rcode.NOTIMP),
        (WIRE[:2] + b"\x20\x00" + WIRE[4:], dns.rcode.NOTIMP),
        (counted(questions=0), dns.rcode.FORMERR),
        (counted(questions=2), dns.rcode.FORMERR),
        (counted(answers=1), dns.rcode.FORMERR),
        (counted(authorities=1), dns.rcode.FORMERR),
        (counted(additionals=1), dns.rcode.FORMERR),
        (counted(additionals=60000), dns.rcode.FORMERR),
        (WIRE[:-1], dns.rcode.FORMERR),
        (WIRE + b"\0", dns.rcode.FORMERR),
        (WIRE + bytes(5000), dns.rcode.FORMERR),
        (WIRE[:12] + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),
        (WIRE[:12] + b"\xc0\xff\0\1\0\1", dns.rcode.FORMERR),
        (WIRE[:12] + b"\x7fabc\0\0\1\0\1", dns.rcode.FORMERR),
        (WIRE[:12] + (b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1", dns.rcode.FORMERR),
        (other(rdtype="AXFR"), dns.rcode.REFUSED),
        (other(rdtype="IXFR"), dns.rcode.REFUSED),
        (other(name="version.bind", rdtype="TXT", rdclass="CH"), dns.rcode.REFUSED),
        (other(rdclass="ANY"), dns.rcode.REFUSED),
        (other(rdtype="TKEY"), dns.rcode.NOTIMP),
        (other(rdtype="OPT"), dns.rcode.NOTIMP),
        (other(use_edns=1), dns.rcode.BADVERS),
        (other("www.example.com", flags=0), dns.rcode.REFUSED),
    ],
    ids=[
        "update",
        "notify",
        "no question",
        "two questions",
        "an answer",
        "an authority",
        "an additional that is not there",
        "60,000 additionals",
        "cut",
        "trailing byte",
        "oversized",
        "pointer to itself",
        "pointer behind the end",
        "label behind the end",
        "name too long",
        "AXFR",
        "IXFR",
        "CHAOS",
        "class ANY",
        "TKEY",
        "OPT",
        "EDNS 1",
        "no recursion, not ours",
    ],
)
def test_what_cannot_be_answered(desk: Desk, data: bytes, rcode: dns.rcode.Rcode) -> None:
    reply = desk.send(data)
    assert header(reply) == (7, rcode)
    assert reply is not None
    assert len(reply) <= len(data)
    assert desk.upstream.asked == []


def test_a_signed_query_is_told_that_we_have_no_key(desk: Desk) -> None:
    query = dns.message.make_query(KUBERNETES, "A", id=7)
    query.use_tsig(dns.tsig.Key("k.example.", b"0123456789abcdef"))
    assert header(desk.send(query.to_wire())) == (7, dns.rcode.NOTAUTH)


def test_outsiders_are_refused_with_no_more_than_a_header(desk: Desk) -> None:
    reply = desk.send(WIRE, source="192.0.2.66")
    assert header(reply) == (7, dns.rcode.REFUSED)
    assert reply is not None
    assert len(reply) == 12


def test_a_flood_is_not_answered() -> None:
    desk = Desk(address, 5)
    replies = [desk.send(WIRE) for _ in range(20)]
    assert [reply is None for reply in replies] == [False] * 5 + [True] * 15
    assert desk.send(WIRE, source="10.42.1.6") is not None
    desk.now += 1
    assert desk.send(WIRE) is not None


def test_any_is_not_for_making_much_of_little(desk: Desk) -> None:
    reply = desk.ask("www.example.com", "ANY")
    assert [rrset.rdtype for rrset in reply.answer] == [dns.rdatatype.HINFO]
    assert desk.upstream.asked == []
    assert len(desk.ask(f"headless.{SVC}", "ANY").answer) == 1


@pytest.fixture
def big(desk: Desk) -> Desk:
    """A headless service of 100 endpoints: 1,600 bytes of addresses."""
    endpoints = tuple(Endpoint((ip_address("10.42.4.0") + number,)) for number in range(100))
    desk.resolver.zone.apply("big", Replace((Service("big", endpoints=endpoints),)))
    return desk


@pytest.mark.parametrize(
    ("edns", "limit"),
    [
        ({}, 512),
        ({"use_edns": 0, "payload": 600}, 600),
        ({"use_edns": 0, "payload": 65000}, UDP_PAYLOAD_BYTES),
    ],
    ids=["no EDNS", "600", "more than we send"],
)
def test_udp_replies_are_cut_to_what_fits(big: Desk, edns: dict[str, int], limit: int) -> None:
    query = dns.message.make_query(f"big.{SVC}", "A", **edns)  # type: ignore[arg-type]
    data = big.send(query.to_wire())
    assert data is not None
    assert len(data) <= limit
    assert dns.message.from_wire(data).flags & dns.flags.TC
    whole = big.ask(f"big.{SVC}", over_tcp=True)
    assert not whole.flags & dns.flags.TC
    assert len(values(whole)) == 100


def test_edns_is_answered_with_edns_and_its_options_are_not(desk: Desk) -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    reply = desk.ask(KUBERNETES, use_edns=0, want_dnssec=True, options=[cookie])
    assert (reply.edns, reply.payload, reply.options) == (0, UDP_PAYLOAD_BYTES, ())
    assert reply.ednsflags & dns.flags.DO
    assert desk.ask(KUBERNETES).edns == -1


def test_dnssec_is_asked_for_whoever_asks_for_it() -> None:
    async def authentic(question: Question) -> dns.message.Message:
        reply = await address(question)
        reply.flags |= dns.flags.AD
        return reply

    desk = Desk(authentic, 1000)
    assert desk.ask("www.example.com", use_edns=0, want_dnssec=True).flags & dns.flags.AD
    assert not desk.ask("www.example.com").flags & dns.flags.AD
    assert [question.dnssec for question in desk.upstream.asked] == [True, False], "kept apart"


def test_nothing_that_goes_wrong_inside_ends_the_service(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(desk.resolver.zone, "look_up", broken)
    assert header(desk.send(WIRE)) == (7, dns.rcode.SERVFAIL)
    assert "broken" in caplog.text
