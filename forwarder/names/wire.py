"""DNS messages: which queries are answered at all, and how answers look on the wire. Pure.

dnspython reads and writes the messages; what a stranger's bytes may make of it is decided here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.SOA
import dns.rrset

from forwarder.names.zone import Rr

HEADER: Final = struct.Struct("!HHHHHH")  # RFC 1035 section 4.1.1
MAX_QUERY_BYTES: Final = 4096
"""A question and its EDNS options: what is longer is no question."""

UDP_PAYLOAD_BYTES: Final = 1232
"""The most we send or ask for in one datagram: it fits IPv6's least MTU (RFC 9715 section 3)."""

PLAIN_PAYLOAD_BYTES: Final = 512  # RFC 1035 section 4.2.1
MAX_MESSAGE_BYTES: Final = 65535

MAX_TTL_SECONDS: Final = 86400
MAX_NEGATIVE_TTL_SECONDS: Final = 3600  # RFC 2308 section 5 allows up to three hours

_NO_DATA_TYPES: Final = frozenset(range(128, 255)) | {dns.rdatatype.OPT}
"""Query and meta types of RFC 6895 section 3.1, but for ANY: no record is of such a type."""

_TRANSFERS: Final = frozenset((dns.rdatatype.AXFR, dns.rdatatype.IXFR))
_PROOFS: Final = frozenset((dns.rdatatype.SOA, dns.rdatatype.NSEC, dns.rdatatype.NSEC3, dns.rdatatype.RRSIG))


class Question(NamedTuple):
    """What is asked of upstream."""

    name: dns.name.Name
    rdtype: int
    dnssec: bool = False
    checking_disabled: bool = False

    @property
    def key(self) -> bytes:
        """The same for names that differ in case only."""
        flags = self.dnssec | self.checking_disabled << 1
        return struct.pack("!BH", flags, self.rdtype) + self.name.to_digestable()


@dataclass(frozen=True, slots=True)
class Query:
    """A question we can answer; `name` is lower-case text without the final dot, `rdtype` text."""

    message: dns.message.Message
    question: Question
    name: str
    rdtype: str

    @property
    def wants_recursion(self) -> bool:
        return bool(self.message.flags & dns.flags.RD)


@dataclass(slots=True)
class Answer:
    """The sections of an answer, as RRsets."""

    rcode: dns.rcode.Rcode
    answer: list[dns.rrset.RRset]
    authority: list[dns.rrset.RRset]
    additional: list[dns.rrset.RRset]
    flags: int = 0

    @classmethod
    def failed(cls, rcode: dns.rcode.Rcode) -> Answer:
        return cls(rcode, [], [], [])


def parse_query(data: bytes) -> Query | bytes | None:
    """The query, or the reply that a faulty one gets, or None for what gets none.

    Replies are never answered (RFC 1035 section 7.3), or two servers would talk for ever.
    """
    if len(data) < HEADER.size or data[2] & 0x80:
        return None
    _, flags, questions, answers, authorities, additionals = HEADER.unpack_from(data)
    if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        return bare_reply(data, dns.rcode.NOTIMP)
    if len(data) > MAX_QUERY_BYTES or questions != 1 or answers or authorities or additionals > 2:
        return bare_reply(data, dns.rcode.FORMERR)
    try:
        message = dns.message.from_wire(data)
    except dns.message.UnknownTSIGKey:
        return bare_reply(data, dns.rcode.NOTAUTH)  # RFC 8945 section 5.2.1: we share no key with anybody
    except Exception:  # Whatever a parser may raise over a stranger's bytes, it is their fault.
        return bare_reply(data, dns.rcode.FORMERR)
    asked = message.question[0]
    dnssec = message.edns >= 0 and bool(message.ednsflags & dns.flags.DO)
    question = Question(asked.name, asked.rdtype, dnssec, bool(message.flags & dns.flags.CD))
    rdtype = type_text(asked.rdtype)
    query = Query(message, question, asked.name.to_text(omit_final_dot=True).lower(), rdtype)
    if message.edns > 0:
        return render(query, Answer.failed(dns.rcode.BADVERS))  # RFC 6891 section 6.1.3
    if asked.rdclass != dns.rdataclass.IN or asked.rdtype in _TRANSFERS:
        return render(query, Answer.failed(dns.rcode.REFUSED))
    if asked.rdtype in _NO_DATA_TYPES:
        return render(query, Answer.failed(dns.rcode.NOTIMP))
    return query


def bare_reply(data: bytes, rcode: int) -> bytes:
    """A header that answers the query's: never longer than what was sent. `data` has at least a header."""
    (ident, flags) = struct.unpack_from("!HH", data)
    kept = flags & (0x7800 | dns.flags.RD)  # opcode and RD
    return HEADER.pack(ident, dns.flags.QR | kept | rcode, 0, 0, 0, 0)


def render(query: Query, answer: Answer, *, over_tcp: bool = False) -> bytes:
    """The reply on the wire, with TC set where it does not fit into what the client takes."""
    response = dns.message.make_response(
        query.message, recursion_available=True, our_payload=UDP_PAYLOAD_BYTES, pad=0
    )
    response.set_rcode(answer.rcode)
    response.flags |= answer.flags | (query.message.flags & dns.flags.CD)
    if query.question.dnssec:
        response.ednsflags |= dns.flags.DO  # RFC 3225 section 3
    response.answer = answer.answer
    response.authority = answer.authority
    response.additional = answer.additional
    return response.to_wire(max_size=_room(query, over_tcp), prefer_truncation=True)


def _room(query: Query, over_tcp: bool) -> int:
    if over_tcp:
        return MAX_MESSAGE_BYTES
    if query.message.edns < 0:
        return PLAIN_PAYLOAD_BYTES
    return max(PLAIN_PAYLOAD_BYTES, min(query.message.payload, UDP_PAYLOAD_BYTES))


def rrsets_of(rrs: Iterable[Rr], query: Query | None = None) -> list[dns.rrset.RRset]:
    """Records as RRsets, in their order; an owner that the query names is spelled as there."""
    rrsets: dict[tuple[str, str], dns.rrset.RRset] = {}
    for rr in rrs:
        rrset = rrsets.get((rr.owner, rr.type))
        if rrset is None:
            owner = query.question.name if query and rr.owner == query.name else _name(rr.owner)
            rrset = dns.rrset.RRset(owner, dns.rdataclass.IN, dns.rdatatype.from_text(rr.type))
            rrsets[rr.owner, rr.type] = rrset
        rrset.add(_rdata(rr.type, rr.value), rr.ttl)
    return list(rrsets.values())


@lru_cache(4096)
def _name(text: str) -> dns.name.Name:
    return dns.name.from_text(text)


@lru_cache(4096)
def _rdata(rdtype: str, value: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text(dns.rdataclass.IN, rdtype, value)


@lru_cache(256)
def type_text(rdtype: int) -> str:
    return dns.rdatatype.to_text(dns.rdatatype.RdataType.make(rdtype))


# Of upstream


class Match(Enum):
    """Whether a datagram is the reply to our query. CASE: but for the case of the name's letters.
    BARE: a failure without the question, as some servers send it."""

    EXACT = "exact"
    CASE = "case"
    BARE = "bare"
    NONE = "none"


def upstream_query(question: Question, ident: int, name: dns.name.Name, *, edns: bool = True) -> bytes:
    """`name` is the question's in a random spelling."""
    message = dns.message.make_query(
        name,
        dns.rdatatype.RdataType.make(question.rdtype),
        use_edns=0 if edns else False,
        want_dnssec=question.dnssec and edns,
        payload=UDP_PAYLOAD_BYTES,
        id=ident,
    )
    if question.checking_disabled:
        message.flags |= dns.flags.CD
    return message.to_wire()


def match(query: bytes, question_bytes: int, reply: bytes) -> Match:
    """Judge a reply by id, opcode and question, which is `question_bytes` long after the query's header."""
    if len(reply) < HEADER.size or reply[:2] != query[:2] or reply[2] & 0xF8 != 0x80:
        return Match.NONE
    _, flags, questions, answers, _, _ = HEADER.unpack_from(reply)
    if questions == 0 and answers == 0 and flags & 0xF:
        return Match.BARE
    end = HEADER.size + question_bytes
    ours, theirs = query[HEADER.size : end], reply[HEADER.size : end]
    if questions != 1 or ours[-4:] != theirs[-4:]:
        return Match.NONE
    if ours == theirs:
        return Match.EXACT
    return Match.CASE if ours.lower() == theirs.lower() else Match.NONE


def parse_reply(data: bytes) -> dns.message.Message:
    """ValueError if it is no DNS message."""
    try:
        return dns.message.from_wire(data)
    except Exception as error:  # As with queries: no bytes may do more than be refused.
        raise ValueError(f"not a DNS message: {error}") from None


def keep_relevant(message: dns.message.Message, question: Question) -> dns.message.Message:
    """The reply with what belongs to the question: the chain of names from it and, where that ends in
    nothing, the proof. The rest could be anything."""
    names = {question.name}
    kept = []
    for rrset in message.answer:
        covers = rrset.name in names
        if rrset.rdtype == dns.rdatatype.DNAME:
            covers = any(name.is_subdomain(rrset.name) for name in names)
        if covers:
            kept.append(rrset)
            if rrset.rdtype == dns.rdatatype.CNAME:
                names.add(rrset[0].target)
    message.answer = kept
    message.authority = [rrset for rrset in message.authority if rrset.rdtype in _PROOFS]
    message.additional = []
    return message


def ttl_of(message: dns.message.Message) -> int:
    """How long a reply may be kept; 0 for one that may not."""
    if message.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return 0
    asked = {one.rdtype for one in message.question}
    ends_in_data = message.rcode() == dns.rcode.NOERROR and any(
        rrset.rdtype != dns.rdatatype.CNAME or rrset.rdtype in asked for rrset in message.answer
    )
    ttls = [rrset.ttl for rrset in message.answer]
    limit = MAX_TTL_SECONDS
    if not ends_in_data:
        soas = [rrset for rrset in message.authority if rrset.rdtype == dns.rdatatype.SOA]
        if not soas:
            return 0  # RFC 2308 section 5
        limit = MAX_NEGATIVE_TTL_SECONDS
        ttls += [min(rrset.ttl, rrset[0].minimum) for rrset in soas]
    return min([limit, *ttls])


def aged(rrsets: Sequence[dns.rrset.RRset], age_seconds: int, query: Query) -> list[dns.rrset.RRset]:
    """Those of a kept reply, their time run down, and the query's name spelled as the client did."""
    for rrset in rrsets:
        rrset.ttl = max(min(rrset.ttl, MAX_TTL_SECONDS) - age_seconds, 0)
        if rrset.name == query.question.name:
            rrset.name = query.question.name
    return list(rrsets)
