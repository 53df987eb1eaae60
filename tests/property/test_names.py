"""Whatever bytes come in, the resolver says nothing or says something that is a reply, and is not made to
say much by little."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network

import dns.message
import dns.name
import dns.rdatatype
from hypothesis import given
from hypothesis import strategies as st

from forwarder.names.limits import Limiter
from forwarder.names.records import Change, Put, Remove, Replace
from forwarder.names.resolver import Resolver
from forwarder.names.upstream import Upstream
from forwarder.names.wire import UDP_PAYLOAD_BYTES, Match, Question, match, parse_reply, upstream_query
from forwarder.names.zone import Zone
from tests.unit.test_names_zone import GATEWAYS, NETWORKS, RECORDS, SPECIFICATION

NAMES = [row[1] for row in SPECIFICATION] + ["www.example.com", "", "loop-a.default.svc.cluster.local"]


def make_resolver() -> Resolver:
    zone = Zone("cluster.local", GATEWAYS, NETWORKS)
    zone.apply("test", Replace(RECORDS))
    limiter = Limiter((ip_network("10.0.0.0/8"),), 1e9)
    return Resolver(zone, limiter, Upstream(tuple), 1 << 16, lambda: 0.0)


RESOLVER = make_resolver()


@st.composite
def queries(draw: st.DrawFn) -> bytes:
    name = draw(st.sampled_from(NAMES))
    edns = draw(st.sampled_from([False, 0, 1]))
    rdtype = dns.rdatatype.RdataType.make(draw(st.integers(0, 65535) | st.sampled_from([1, 28, 33, 255, 41])))
    payload = draw(st.integers(0, 65535))
    rdclass = draw(st.sampled_from(["IN", "CH", "ANY"]))
    query = dns.message.make_query(name, rdtype, rdclass, use_edns=edns, payload=payload, id=draw(ids))
    return query.to_wire()


ids = st.integers(0, 65535)


@st.composite
def mutated(draw: st.DrawFn, of: st.SearchStrategy[bytes]) -> bytes:
    """With bytes replaced, put in and taken out, or cut."""
    data = bytearray(draw(of))
    for _ in range(draw(st.integers(0, 6))):
        if not data:
            break
        place = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                data[place] = draw(st.integers(0, 255))
            case 1:
                data[place:place] = draw(st.binary(max_size=20))
            case 2:
                del data[place : place + draw(st.integers(1, 8))]
            case _:
                data[place : place + 2] = b"\xc0" + bytes([draw(st.integers(0, 255))])
    return bytes(data)


@given(
    mutated(queries()) | st.binary(max_size=600), st.booleans(), st.sampled_from(["10.1.2.3", "192.0.2.1"])
)
def test_any_bytes_get_a_reply_or_none(data: bytes, over_tcp: bool, source: str) -> None:
    async def receive() -> bytes | None:
        reply = RESOLVER.receive(data, source, 0.0, over_tcp=over_tcp)
        return reply if reply is None or isinstance(reply, bytes) else await reply

    reply = asyncio.run(receive())
    if reply is None:
        assert len(data) < 12 or data[2] & 0x80
        return
    assert reply[:2] == data[:2]
    assert reply[2] & 0x80
    message = dns.message.from_wire(reply)
    if source == "192.0.2.1":
        assert len(reply) == 12
    if not over_tcp:
        assert len(reply) <= UDP_PAYLOAD_BYTES
    if message.question:
        assert dns.message.from_wire(data).is_response(message)


QUESTION = Question(dns.name.from_text("www.example.com"), dns.rdatatype.A)
ASKED = upstream_query(QUESTION, 4711, QUESTION.name)
REPLY = dns.message.make_response(dns.message.from_wire(ASKED)).to_wire()


@given(mutated(st.just(REPLY)) | st.binary(max_size=300))
def test_any_reply_is_matched_and_parsed_or_refused(data: bytes) -> None:
    matched = match(ASKED, len(QUESTION.name.to_wire()) + 4, data)  # type: ignore[arg-type]
    if matched is Match.NONE:
        return
    assert data[:2] == ASKED[:2]
    try:
        message = parse_reply(data)
    except ValueError:
        return
    if matched is Match.EXACT:
        assert message.question[0].name == QUESTION.name


records = st.sampled_from(RECORDS)
changes = st.one_of(
    st.builds(Replace, st.lists(records, max_size=5).map(tuple)),
    st.builds(Put, st.lists(records, max_size=3).map(tuple)),
    st.builds(Remove, st.lists(records.map(lambda record: record.key), max_size=3).map(tuple)),
)


@given(st.lists(st.tuples(st.sampled_from("ab"), changes), max_size=12))
def test_a_history_of_changes_ends_where_its_last_states_do(history: list[tuple[str, Change]]) -> None:
    zone, fresh = (Zone("cluster.local", GATEWAYS, NETWORKS) for _ in range(2))
    states: dict[str, dict[object, object]] = {"a": {}, "b": {}}
    for source, change in history:
        zone.apply(source, change)
        state = states[source]
        if isinstance(change, Remove):
            for key in change.keys:
                state.pop(key, None)
        else:
            if isinstance(change, Replace):
                state.clear()
            state.update((record.key, record) for record in change.records)
    for source, state in states.items():
        fresh.apply(source, Replace(tuple(state.values())))  # type: ignore[arg-type]
    assert set(zone.listing()) == set(fresh.listing())
    assert zone._population == fresh._population
