"""Whether each peer is reached and reaches us, how long a round trip takes, what is lost, what fits. Pure.

A peer is *up* while we hear it and it says that it hears us: so a path that is dead in one direction is down
on both sides. We *hear* a peer until none of its reports came in its own detection time, and hear it again
when as many in a row have come as its recent falls demand: once lost, it must earn that, and twice as hard
each time (flap damping). What is not known yet is `unknown`.

`now` is any clock that only goes forward, in seconds; `random` gives numbers from 0 to 1. Call `poll` when it
is `next_at`, `hear` with each message, and send what either returns, at once.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from forwarder.path_search import PathSearch
from forwarder.probe import (
    MAX_HELD_US,
    MAX_INTERVAL_MS,
    WINDOW,
    Padded,
    Report,
    encode_padded,
    encode_report,
)

MAX_PROBES_PER_SECOND: Final = 2000
"""That a node sends by itself. From as many peers times the interval on, intervals are stretched."""

BATCH: Final = 256
"""Sessions in one `poll`, so that packets never wait long for it."""

JITTER: Final = 0.25
"""Of an interval, which is shortened by up to as much at random (RFC 5880 section 6.8.7)."""

CALM_SECONDS: Final = 300.0
"""Of hearing a peer without a gap, after which its falls before are forgotten."""

MAX_RISE: Final = 32
"""Reports in a row that are asked for at most, of a peer that fell often."""

MAX_DETECT_SECONDS: Final = 120.0
"""However slowly a peer says that it sends."""

PADDED_INTERVALS: Final = 5
"""From one padded probe to the next, while nothing is wrong."""

URGENT_SECONDS: Final = 0.2
"""The same while a path's MTU is searched for."""

LATE_SECONDS: Final = 1.0
"""Of a `poll`, from which on the silence is taken to be our own: what came meanwhile is not heard yet."""

FLOOR_BYTES: Final = 646
"""Of the outer packet: leaves 576 bytes inside, which every IPv4 host must take (RFC 791)."""

_ALL: Final = (1 << WINDOW) - 1
_NUMBERS: Final = 1 << 32


class State(enum.StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Send:
    """A probe for a peer, as a packet of that flow; padded until the outer packet has `size_bytes`."""

    peer_id: str
    flow: int
    probe: bytes
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PeerHealth:
    """`since` is in `now`'s seconds. Losses are shares, 0 to 1, of the last WINDOW reports: `encap_loss` of
    ours, by the peer's last word, None if there is none; `short_path_bytes` is what padded probes found
    to be carried, outer IP header included, None where that is all that the kernel lets through."""

    state: State
    since: float
    fault: str | None
    """Why it is down, in words."""
    rtt_seconds: float | None
    smoothed_rtt_seconds: float | None
    encap_loss: float | None
    decap_loss: float | None
    short_path_bytes: int | None


@dataclass(slots=True)
class _Heard:
    """What we heard of a peer's reports, in one life of it. What came before its first is nobody's loss."""

    session: int
    sequence: int
    mask: int = _ALL
    padded: int = 0

    def note(self, sequence: int) -> bool:
        """Whether it is the newest. Those that come late are only not lost."""
        ahead = (sequence - self.sequence) % _NUMBERS
        if 0 < ahead < _NUMBERS // 2:
            self.mask = (self.mask << ahead | 1) & _ALL if ahead < WINDOW else 1
            self.sequence = sequence
            return True
        behind = _NUMBERS - ahead if ahead else 0
        if behind < WINDOW:
            self.mask |= 1 << behind
        return False

    def in_a_row(self, count: int) -> bool:
        wanted = (1 << count) - 1
        return self.mask & wanted == wanted


@dataclass(slots=True)
class _Padding:
    """A padded probe that is under way, and the report sent behind it."""

    number: int
    size_bytes: int
    sequence: int


@dataclass(slots=True)
class _Session:
    peer_id: str
    started_at: float
    since: float
    state: State = State.UNKNOWN
    # sending
    sequence: int = 0
    sent_at: list[float] = field(default_factory=lambda: [0.0] * WINDOW)  # by sequence, modulo
    send_at: float = 0.0
    due_at: float = 0.0  # of its entry in the heap; others are old
    # hearing
    heard: _Heard | None = None
    heard_at: float = 0.0
    detect_seconds: float = 0.0
    interval_seconds: float = 1.0  # the peer's
    hears: bool = False
    risen_at: float = 0.0
    falls: int = 0
    # what the peer says of us
    is_heard: bool = False
    excused_until: float = 0.0
    encap_mask: int | None = None
    echoed: int = 0
    rtt: float | None = None
    smoothed_rtt: float | None = None
    # path MTU
    search: PathSearch | None = None
    padding: _Padding | None = None
    padded_number: int = 0
    pad_at: float = 0.0


class Health:
    """The sessions with all peers that answer probes."""

    def __init__(
        self,
        session: int,
        random: Callable[[], float],
        *,
        interval_seconds: float = 1.0,
        detect_multiplier: int = 3,
    ) -> None:
        """`session` is a random number from 1 to 2**32 - 1, another one in each life of the daemon."""
        self._session = session
        self._random = random
        self._interval_seconds = interval_seconds
        self._detect_multiplier = detect_multiplier
        self._sessions: dict[str, _Session] = {}
        self._heap: list[tuple[float, str]] = []
        self._deaf_until = float("-inf")
        self._changes: dict[str, State] = {}

    def add(self, peer_id: str, now: float) -> None:
        """Begin with a peer, at a random moment of the first interval. One that is there stays as it is."""
        if peer_id in self._sessions:
            return
        session = self._sessions[peer_id] = _Session(peer_id, started_at=now, since=now)
        session.send_at = now + self._interval() * self._random()
        session.detect_seconds = self._detect_multiplier * self._interval()
        self._schedule(session)

    def remove(self, peer_id: str) -> None:
        """Forget a peer, if it is there."""
        self._sessions.pop(peer_id, None)
        self._changes.pop(peer_id, None)

    def limit(self, peer_id: str, ceiling_bytes: int) -> None:
        """The kernel lets outer packets of that size through to this peer, and no longer ones."""
        session = self._sessions.get(peer_id)
        if session is None:
            return
        if session.search is None:
            session.search = PathSearch(ceiling_bytes, FLOOR_BYTES)
        else:
            before = session.search.size_bytes
            session.search.limit(ceiling_bytes)
            if session.search.size_bytes != before:
                session.padding = None

    def short_path_bytes(self, peer_id: str) -> int | None:
        """PeerHealth.short_path_bytes; None for a peer that is not probed."""
        session = self._sessions.get(peer_id)
        return session.search.short_bytes if session is not None and session.search is not None else None

    def state(self, peer_id: str, now: float) -> PeerHealth | None:
        """None for a peer that is not probed."""
        session = self._sessions.get(peer_id)
        if session is None:
            return None
        return PeerHealth(
            state=session.state,
            since=session.since,
            fault=_fault(session),
            rtt_seconds=session.rtt,
            smoothed_rtt_seconds=session.smoothed_rtt,
            encap_loss=_loss(session.encap_mask) if session.hears else None,
            decap_loss=_decap_loss(session, now),
            short_path_bytes=self.short_path_bytes(peer_id),
        )

    def take_changes(self) -> dict[str, State]:
        """The peers whose state changed since the last call, and the state it has now."""
        changes, self._changes = self._changes, {}
        return changes

    def next_at(self) -> float | None:
        """When to `poll` next; None if there is nobody to probe."""
        return self._heap[0][0] if self._heap else None

    def poll(self, now: float) -> list[Send]:
        """Judge who is silent, and say what to send, for some of those whose time has come."""
        sends: list[Send] = []
        if self._heap and now - self._heap[0][0] > LATE_SECONDS:
            self._deaf_until = now
        for _ in range(BATCH):
            if not self._heap or self._heap[0][0] > now:
                break
            due_at, peer_id = heapq.heappop(self._heap)
            session = self._sessions.get(peer_id)
            if session is None or session.due_at != due_at:
                continue  # it has gone, or its time has changed
            session.due_at = float("-inf")
            self._serve(session, now, sends)
            self._schedule(session)
        return sends

    def hear(self, peer_id: str, message: Report | Padded, now: float) -> list[Send]:
        """Take in what a peer says; what to tell it at once."""
        session = self._sessions.get(peer_id)
        if session is None:
            return []
        if isinstance(message, Padded):
            if session.heard is not None and session.heard.session == message.session:
                session.heard.padded = message.number
            return []
        sends: list[Send] = []
        life_before = session.heard.session if session.heard is not None else 0
        if self._note(session, message, now):
            heard_before = session.hears
            self._judge_hearing(session, now)
            self._take_feedback(session, message, now)
            self._judge(session, now)
            is_news = session.hears != heard_before or message.session != life_before
            if message.wants_answer or is_news:
                self._report(session, now, sends)
            self._schedule(session)
        return sends

    # Hearing

    def _note(self, session: _Session, report: Report, now: float) -> bool:
        """Whether the report is the newest of its peer."""
        if session.heard is None or session.heard.session != report.session:
            session.heard = _Heard(report.session, report.sequence)
            session.padding = None
            if session.state == State.UP:
                # The peer has started again, and will hear us in a moment.
                session.excused_until = now + session.detect_seconds
        elif not session.heard.note(report.sequence):
            return False
        session.heard_at = now
        session.interval_seconds = report.interval_ms / 1000
        session.detect_seconds = min(report.detect_multiplier * session.interval_seconds, MAX_DETECT_SECONDS)
        return True

    def _judge_hearing(self, session: _Session, now: float) -> None:
        """Begin to hear a peer that has earned it, or stop to hear one that is silent for too long."""
        if session.hears:
            if now >= self._silent_at(session):
                calm = now - session.risen_at > CALM_SECONDS
                session.falls = 1 if calm else session.falls + 1
                session.hears = False
        elif (
            session.heard is not None
            and now < self._silent_at(session)
            and session.heard.in_a_row(self._rise(session))
        ):
            session.hears, session.risen_at = True, now

    def _rise(self, session: _Session) -> int:
        """How many reports in a row make a peer heard."""
        if session.falls == 0:
            return 1
        return int(min(self._detect_multiplier << min(session.falls - 1, 5), MAX_RISE))

    def _silent_at(self, session: _Session) -> float:
        """When a peer that stays silent is not heard any more."""
        return max(session.heard_at, self._deaf_until) + session.detect_seconds

    def _judge(self, session: _Session, now: float) -> None:
        is_excused = session.state == State.UP and now < session.excused_until
        if session.hears and (session.is_heard or is_excused):
            state = State.UP
        elif session.state == State.UNKNOWN and now < self._known_at(session):
            return
        else:
            state = State.DOWN
        if state != session.state:
            session.state, session.since = state, now
            session.padding = None
            session.pad_at = now  # what fits is the first that is asked of a path that works
            self._changes[session.peer_id] = state

    def _known_at(self, session: _Session) -> float:
        """When a peer that nothing is known of is down."""
        return max(session.started_at, self._deaf_until) + session.detect_seconds + self._interval()

    def _take_feedback(self, session: _Session, report: Report, now: float) -> None:
        if report.heard_session != self._session:
            session.is_heard = False  # it has not heard us yet, or only in a former life
            return
        session.is_heard = report.hears
        session.encap_mask = report.heard_mask
        age = (session.sequence - report.heard_sequence) % _NUMBERS
        if age >= WINDOW:
            return
        if report.heard_sequence != session.echoed:
            session.echoed = report.heard_sequence
            sent_at = session.sent_at[report.heard_sequence % WINDOW]
            self._take_rtt(session, max(0.0, now - sent_at - report.held_us / 1e6))
        padding = session.padding
        if padding is not None and age <= (session.sequence - padding.sequence) % _NUMBERS:
            # The report sent behind the padded probe was heard. Was the probe?
            session.padding = None
            self._settle(session, padding, report.heard_padded == padding.number, now)

    def _take_rtt(self, session: _Session, rtt: float) -> None:
        session.rtt = rtt
        smoothed = session.smoothed_rtt
        # RFC 6298 section 2
        session.smoothed_rtt = rtt if smoothed is None else smoothed + (rtt - smoothed) / 8

    def _settle(self, session: _Session, padding: _Padding, passed: bool, now: float) -> None:
        assert session.search is not None  # noqa: S101 (it gave the size)
        if passed:
            session.search.passed(padding.size_bytes)
        else:
            session.search.lost(padding.size_bytes)
        pause = URGENT_SECONDS if session.search.is_urgent else PADDED_INTERVALS * self._interval()
        session.pad_at = now + pause

    # Sending

    def _interval(self) -> float:
        stretched = len(self._sessions) / MAX_PROBES_PER_SECOND
        return min(max(self._interval_seconds, stretched), MAX_INTERVAL_MS / 1000)

    def _serve(self, session: _Session, now: float, sends: list[Send]) -> None:
        heard_before = session.hears
        self._judge_hearing(session, now)
        self._judge(session, now)
        may_pad = session.state == State.UP and session.search is not None and session.padding is None
        if may_pad and now >= session.pad_at:
            self._pad(session, now, sends)
        elif now >= session.send_at or session.hears != heard_before:
            self._report(session, now, sends)

    def _schedule(self, session: _Session) -> None:
        """Put it on the heap for the next moment at which there is something to do or to judge."""
        due_at = session.send_at
        if session.hears:
            due_at = min(due_at, self._silent_at(session))
        if session.state == State.UNKNOWN:
            due_at = min(due_at, self._known_at(session))
        elif session.state == State.UP and session.search is not None and session.padding is None:
            due_at = min(due_at, session.pad_at)
        if due_at != session.due_at:
            session.due_at = due_at
            heapq.heappush(self._heap, (due_at, session.peer_id))

    def _report(
        self, session: _Session, now: float, sends: list[Send], *, behind: _Padding | None = None
    ) -> None:
        interval = self._interval()
        session.sequence = (session.sequence + 1) % _NUMBERS
        session.sent_at[session.sequence % WINDOW] = now
        session.send_at = now + interval * (1 - JITTER * self._random())
        heard = session.heard
        if heard is None:
            heard = _Heard(0, 0, 0)
        report = Report(
            session=self._session,
            sequence=session.sequence,
            interval_ms=max(1, round(interval * 1000)),
            detect_multiplier=self._detect_multiplier,
            hears=session.hears,
            wants_answer=behind is not None,
            heard_session=heard.session,
            heard_sequence=heard.sequence,
            heard_mask=heard.mask,
            held_us=min(max(0, round((now - session.heard_at) * 1e6)), MAX_HELD_US) if heard.session else 0,
            heard_padded=heard.padded,
        )
        # By turns over all source ports, so that no way is left out; but the padded one's, behind that.
        flow = behind.number if behind is not None else session.sequence
        sends.append(Send(session.peer_id, flow, encode_report(report)))

    def _pad(self, session: _Session, now: float, sends: list[Send]) -> None:
        assert session.search is not None  # noqa: S101 (the caller looked)
        session.padded_number = (session.padded_number + 1) % _NUMBERS
        number, size_bytes = session.padded_number, session.search.size_bytes
        session.padding = _Padding(number, size_bytes, (session.sequence + 1) % _NUMBERS)
        probe = encode_padded(Padded(self._session, number))
        sends.append(Send(session.peer_id, number, probe, size_bytes))
        self._report(session, now, sends, behind=session.padding)


def _fault(session: _Session) -> str | None:
    if session.state != State.DOWN:
        return None
    if not session.hears:
        return "nothing is heard of it"
    return "it does not hear us"


def _loss(mask: int | None) -> float | None:
    return None if mask is None else (WINDOW - mask.bit_count()) / WINDOW


def _decap_loss(session: _Session, now: float) -> float | None:
    """Those that are overdue since the last one are lost, too."""
    if session.heard is None:
        return None
    overdue = max(0, int((now - session.heard_at) / session.interval_seconds) - 1)
    return _loss(session.heard.mask << overdue & _ALL) if overdue < WINDOW else 1.0
