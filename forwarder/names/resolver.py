"""From a client's bytes to the reply's: who is served, from the zone, from the cache, or by upstream.

Nothing here knows a socket. Time is an argument, and what must wait for upstream is a coroutine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from forwarder.names.cache import Cache
from forwarder.names.limits import Limiter, Verdict
from forwarder.names.servers import Server
from forwarder.names.upstream import Upstream, UpstreamError
from forwarder.names.wire import (
    HEADER,
    Answer,
    Query,
    Question,
    aged,
    bare_reply,
    parse_query,
    render,
    rrsets_of,
    ttl_of,
)
from forwarder.names.zone import Found, Rr, Zone

MAX_WAITING: Final = 512
"""Queries that wait for upstream at once; one more gets SERVFAIL."""

MAX_WAITING_OF_SOURCE: Final = 64
REPEAT_SECONDS: Final = 1.0
"""How long the same bytes get the same reply of upstream without being read again: TTLs are off by no more
than that. The zone's replies have no such age; they are forgotten when it changes."""

ZONE_REPEAT_SECONDS: Final = 600.0

REPEAT_SHARE: Final = 8
"""Replies for repetition get this part of the cache's memory."""

FAILURE_SECONDS: Final = 2.0
"""How long a failure of upstream is remembered (RFC 9520 section 3.2 wants it, for 1 s to 300 s)."""

MAX_PLAIN_RCODE: Final = 15
"""Higher ones are of EDNS, between upstream and us."""

log = logging.getLogger("podloom.names")

Reply = bytes | None
"""What goes back; None is silence."""


class Resolver:
    """Answers queries. `clock` is monotonic seconds, for replies that come later."""

    def __init__(
        self, zone: Zone, limiter: Limiter, upstream: Upstream, cache_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.zone = zone
        self.counters: Counter[str] = Counter()
        self._limiter = limiter
        self._upstream = upstream
        self._clock = clock
        self._repeats = Cache(cache_bytes // REPEAT_SHARE)
        self._cache = Cache(cache_bytes - cache_bytes // REPEAT_SHARE)
        self._asking: dict[bytes, asyncio.Task[bytes]] = {}
        self._waiting: Counter[str] = Counter()

    def forget_repeats(self) -> None:
        """To be called when the zone has changed."""
        self._repeats.clear()

    def upstream_servers(self) -> Sequence[Server]:
        return self._upstream.servers()

    def receive(
        self, data: bytes, source: str, now: float, *, over_tcp: bool
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """The reply to what `source` sent, or what it takes to get it. Never raises."""
        self.counters["received"] += 1
        verdict = self._limiter.judge(source, now)
        if verdict is not Verdict.SERVE:
            return self._turn_away(data, verdict)
        key = b"%d" % over_tcp + data[2:]
        if repeat := self._repeats.get(key, now):
            self.counters["repeated"] += 1
            return data[:2] + repeat.value
        try:
            query = parse_query(data)
            if not isinstance(query, Query):
                self.counters["ignored" if query is None else "refused"] += 1
                return query
            found = self.zone.look_up(query.name, query.rdtype)
            if found is not None and not found.alias:
                self.counters["zone"] += 1
                ours = render(query, _from_zone(query, found), over_tcp=over_tcp)
                self._repeats.put(key, ours[2:], now, ZONE_REPEAT_SECONDS)
                return ours
            reply = self._answer(query, found, source, now, over_tcp=over_tcp)
            if isinstance(reply, bytes):
                self._repeats.put(key, reply[2:], now, REPEAT_SECONDS)
            return reply
        except Exception:
            log.exception("a query could not be answered")
            return bare_reply(data, dns.rcode.SERVFAIL)

    def _turn_away(self, data: bytes, verdict: Verdict) -> Reply:
        if verdict is Verdict.DROP:
            self.counters["over_rate"] += 1
            return None
        self.counters["outsiders"] += 1
        if len(data) < HEADER.size or data[2] & 0x80:
            return None
        return bare_reply(data, dns.rcode.REFUSED)

    def _answer(
        self, query: Query, found: Found | None, source: str, now: float, *, over_tcp: bool
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """What is not ours, or `found` to go on at a name that is not."""
        if found is None and not query.wants_recursion:
            self.counters["refused"] += 1
            return render(query, Answer.failed(dns.rcode.REFUSED), over_tcp=over_tcp)
        if found is None and query.question.rdtype == dns.rdatatype.ANY:
            # All that upstream has would make a small query a big reply. RFC 8482 section 4.2.
            minimal = rrsets_of([Rr(query.name, "HINFO", '"RFC8482" ""', 3600)], query)
            return render(query, Answer(dns.rcode.NOERROR, minimal, [], []), over_tcp=over_tcp)
        question = query.question
        if found is not None:
            question = question._replace(name=dns.name.from_text(found.alias))
        kept = self._cache.get(question.key, now)
        if kept is not None:
            self.counters["cached"] += 1
            answer = self._from_upstream(query, found, kept.value, int(now - kept.put_at))
            return render(query, answer, over_tcp=over_tcp)
        total = self._waiting.total()
        if total >= MAX_WAITING or self._waiting[source] >= MAX_WAITING_OF_SOURCE:
            self.counters["overloaded"] += 1
            return render(query, Answer.failed(dns.rcode.SERVFAIL), over_tcp=over_tcp)
        return self._forward(query, found, question, source, over_tcp=over_tcp)

    async def _forward(
        self, query: Query, found: Found | None, question: Question, source: str, *, over_tcp: bool
    ) -> Reply:
        self._waiting[source] += 1
        try:
            reply = await asyncio.shield(self._ask(question))
            return render(query, self._from_upstream(query, found, reply, 0), over_tcp=over_tcp)
        except Exception:
            log.exception("a query could not be forwarded")
            return render(query, Answer.failed(dns.rcode.SERVFAIL), over_tcp=over_tcp)
        finally:
            self._waiting[source] -= 1
            if not self._waiting[source]:
                del self._waiting[source]

    def _ask(self, question: Question) -> asyncio.Task[bytes]:
        """The one task that asks this question now, whoever waits for it."""
        task = self._asking.get(question.key)
        if task is None:
            task = asyncio.create_task(self._ask_upstream(question))
            self._asking[question.key] = task
            task.add_done_callback(lambda _: self._asking.pop(question.key, None))
        return task

    async def _ask_upstream(self, question: Question) -> bytes:
        self.counters["forwarded"] += 1
        try:
            message = await self._upstream.ask(question)
        except UpstreamError:
            message = dns.message.Message()
            message.flags = dns.flags.QR
            message.set_rcode(dns.rcode.SERVFAIL)
        ttl: float = ttl_of(message)
        if message.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            self.counters["upstream_failures"] += 1
            ttl = FAILURE_SECONDS
        wire = message.to_wire(max_size=65535)
        self._cache.put(question.key, wire, self._clock(), ttl)
        return wire

    @staticmethod
    def _from_upstream(query: Query, found: Found | None, reply: bytes, age_seconds: int) -> Answer:
        message = dns.message.from_wire(reply)
        aliases = rrsets_of(found.answer, query) if found else []
        rcode = message.rcode()
        # What upstream says of authenticity is only true of the whole answer, and for who asked (RFC 6840
        # section 5.8).
        asked_for = query.message.flags & dns.flags.AD or query.question.dnssec
        return Answer(
            dns.rcode.SERVFAIL if rcode > MAX_PLAIN_RCODE else rcode,
            [*aliases, *aged(message.answer, age_seconds, query)],
            aged(message.authority, age_seconds, query),
            [],
            message.flags & dns.flags.AD if asked_for and not found else 0,
        )


def _from_zone(query: Query, found: Found) -> Answer:
    return Answer(
        dns.rcode.from_text(found.rcode),
        rrsets_of(found.answer, query),
        rrsets_of(found.authority, query),
        rrsets_of(found.additional, query),
        dns.flags.AA,
    )
