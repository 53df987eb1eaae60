"""Bidirectional Forwarding Detection in asynchronous mode: the packet, and one session's state. Pure.

RFC 5880; padded as in RFC 9764, so that what is too long for a path does not look well on it. Left out are
authentication, and demand and echo mode. Time is seconds on any one clock; intervals on the wire are
microseconds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

_PACKET = struct.Struct("!BBBBIIIII")
PACKET_BYTES: Final = _PACKET.size
VERSION: Final = 1
POLL, FINAL, AUTHENTICATION, MULTIPOINT = 0x20, 0x10, 0x04, 0x01

SLOW_SECONDS: Final = 1.0
"""Between packets while the session is not up: at least a second (RFC 5880 section 6.8.3)."""

FAST_SECONDS: Final = 0.5
MULTIPLIER: Final = 3
"""Up, a session is down after MULTIPLIER * FAST_SECONDS of silence."""

MICROSECONDS: Final = 1_000_000


class State(IntEnum):
    ADMIN_DOWN = 0
    DOWN = 1
    INIT = 2
    UP = 3


class Diagnostic(IntEnum):
    NONE = 0
    TIME_EXPIRED = 1
    NEIGHBOUR_DOWN = 3


@dataclass(frozen=True, slots=True)
class Packet:
    """`mine` and `yours` are the discriminators of the sender's session and of the receiver's; the intervals
    are in microseconds."""

    state: State
    diagnostic: int
    mine: int
    yours: int
    desired_min_tx: int
    required_min_rx: int
    multiplier: int = MULTIPLIER
    poll: bool = False
    final: bool = False


class RefusedError(ValueError):
    """Not a packet for us; the text is the reason to count it under."""


def encode(packet: Packet, length: int = PACKET_BYTES) -> bytes:
    """The packet, with zeros behind it up to `length` bytes."""
    flags = (POLL if packet.poll else 0) | (FINAL if packet.final else 0)
    return _PACKET.pack(
        VERSION << 5 | packet.diagnostic,
        packet.state << 6 | flags,
        packet.multiplier,
        PACKET_BYTES,
        packet.mine,
        packet.yours,
        packet.desired_min_tx,
        packet.required_min_rx,
        0,
    ).ljust(length, b"\0")


def decode(data: bytes) -> Packet:
    """RefusedError as RFC 5880 section 6.8.6 asks."""
    if len(data) < PACKET_BYTES:
        raise RefusedError("short")
    first, second, multiplier, length, mine, yours, desired, required, _ = _PACKET.unpack_from(data)
    if first >> 5 != VERSION:
        raise RefusedError("version")
    if not PACKET_BYTES <= length <= len(data):
        raise RefusedError("length")
    if second & AUTHENTICATION:
        raise RefusedError("authentication")
    state = State(second >> 6)
    if multiplier == 0 or second & MULTIPOINT or mine == 0:
        raise RefusedError("malformed")
    if yours == 0 and state > State.DOWN:
        raise RefusedError("discriminator")
    return Packet(
        state,
        first & 31,
        mine,
        yours,
        desired,
        required,
        multiplier,
        bool(second & POLL),
        bool(second & FINAL),
    )


class Session:
    """One end. `receive` takes what came, `tick` gives what is due; both move the state."""

    def __init__(self, discriminator: int) -> None:
        """`discriminator` is unique among this node's sessions, and not zero."""
        self.state = State.DOWN
        self.heard_at: float | None = None
        self._discriminator = discriminator
        self._diagnostic = Diagnostic.NONE
        self._remote_discriminator = 0
        self._remote_min_rx = 1
        self._remote_desired_tx = 0
        self._remote_multiplier = 0
        self._polling = False
        self._next_at = 0.0

    @property
    def next_at(self) -> float:
        """When `tick` has something to send or to notice."""
        if self.heard_at is None or self.state == State.DOWN:
            return self._next_at
        return min(self._next_at, self.heard_at + self._detection_seconds)

    def receive(self, packet: Packet, now: float) -> Packet | None:
        """The answer that is due at once, if any. RefusedError if the packet is another session's."""
        if packet.yours not in (0, self._discriminator):
            raise RefusedError("discriminator")
        self.heard_at = now
        self._remote_discriminator = packet.mine
        self._remote_min_rx = packet.required_min_rx
        self._remote_desired_tx = packet.desired_min_tx
        self._remote_multiplier = packet.multiplier
        if packet.final:
            self._polling = False
        self._follow(packet.state, now)
        return self._packet(final=True) if packet.poll else None

    def _follow(self, remote: State, now: float) -> None:
        """The state machine of RFC 5880 sections 6.2 and 6.8.6."""
        match self.state, remote:
            case ((State.INIT | State.UP), State.ADMIN_DOWN):
                self._move(State.DOWN, now, Diagnostic.NEIGHBOUR_DOWN)
            case State.DOWN, State.DOWN:
                self._move(State.INIT, now)
            case (State.DOWN, State.INIT) | (State.INIT, State.INIT | State.UP):
                self._move(State.UP, now)
            case State.UP, State.DOWN:
                self._move(State.DOWN, now, Diagnostic.NEIGHBOUR_DOWN)

    def tick(self, now: float, jitter: float) -> Packet | None:
        """The periodic packet if it is due. `jitter` is what the interval is multiplied by, 0.75 to 1."""
        if self.state in (State.INIT, State.UP) and now >= (self.heard_at or 0.0) + self._detection_seconds:
            self._remote_discriminator = 0
            self._move(State.DOWN, now, Diagnostic.TIME_EXPIRED)
        if now < self._next_at or self._remote_min_rx == 0:
            return None
        seconds = max(self._desired_tx, self._remote_min_rx) / MICROSECONDS
        self._next_at = now + seconds * jitter
        return self._packet(final=False)

    def _move(self, state: State, now: float, diagnostic: Diagnostic = Diagnostic.NONE) -> None:
        self.state, self._diagnostic = state, diagnostic
        # The other end is told at once, and that the interval changed by a Poll sequence (section 6.8.3).
        self._next_at = now
        self._polling = state == State.UP

    @property
    def _desired_tx(self) -> int:
        return int((FAST_SECONDS if self.state == State.UP else SLOW_SECONDS) * MICROSECONDS)

    @property
    def _detection_seconds(self) -> float:
        """Section 6.8.4."""
        interval = max(self._remote_desired_tx, int(FAST_SECONDS * MICROSECONDS)) / MICROSECONDS
        return self._remote_multiplier * interval

    def _packet(self, *, final: bool) -> Packet:
        return Packet(
            state=self.state,
            diagnostic=self._diagnostic,
            mine=self._discriminator,
            yours=self._remote_discriminator,
            desired_min_tx=self._desired_tx,
            required_min_rx=int(FAST_SECONDS * MICROSECONDS),
            poll=self._polling and not final,
            final=final,
        )
