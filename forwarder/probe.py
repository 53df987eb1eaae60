"""Probes: what two nodes tell each other about the path between them, to bytes and back. Pure.

There are no replies. Each side sends *reports* by its own clock, and each report says what was heard of the
other's: so either side knows of both directions, and what is sent is never more than what is asked for. A
*padded* probe is one that is long on purpose; the next report says whether it came.

All numbers are big-endian; the first four bytes are `fastpath/wire/probe.pxd`'s:

    report: tag (3), kind 1 (1), flags (1), detect multiplier (1), interval in ms (2), session (4),
            sequence (4), heard session (4), heard sequence (4), heard mask (8), held in us (4),
            heard padded (4), zeroes (24)
    padded: tag (3), kind 2 (1), session (4), number (4), zeroes (52)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

PROBE_BYTES: Final = 64
TAG: Final = b"pl\x01"

ETHERTYPE: Final = 0x88B5
"""IEEE Std 802, Local Experimental EtherType 1."""

KIND_REPORT: Final = 1
KIND_PADDED: Final = 2

HEARS: Final = 0x01
"""The sender hears the session that it names, often enough."""
ANSWER: Final = 0x02
"""The sender would like the next report now."""

WINDOW: Final = 64
"""Sequence numbers that a report tells of: bit i of the mask is that of `heard_sequence` - i."""

MAX_INTERVAL_MS: Final = 0xFFFF
MAX_HELD_US: Final = 0xFFFFFFFF

_REPORT: Final = struct.Struct("!3sBBBHIIIIQII24x")
_PADDED: Final = struct.Struct("!3sBII52x")


def probe_frame(destination: bytes, source: bytes, probe: bytes) -> bytes:
    """The Ethernet frame around a probe, between two router MACs."""
    return destination + source + struct.pack("!H", ETHERTYPE) + probe


@dataclass(frozen=True, slots=True)
class Report:
    """The `session` is a random number of the daemon's life, `sequence` counts its reports to this peer. The
    next one comes within `interval_ms`, and if none comes in `detect_multiplier` of these, none comes at
    all (RFC 5880 section 6.8.4). What was `heard` is of the peer's: 0 is no session. `held_us` is how long
    ago `heard_sequence` came, `heard_padded` the last padded probe's number."""

    session: int
    sequence: int
    interval_ms: int
    detect_multiplier: int
    hears: bool = False
    wants_answer: bool = False
    heard_session: int = 0
    heard_sequence: int = 0
    heard_mask: int = 0
    held_us: int = 0
    heard_padded: int = 0


@dataclass(frozen=True, slots=True)
class Padded:
    session: int
    number: int


def encode_report(report: Report) -> bytes:
    return _REPORT.pack(
        TAG,
        KIND_REPORT,
        (HEARS if report.hears else 0) | (ANSWER if report.wants_answer else 0),
        report.detect_multiplier,
        report.interval_ms,
        report.session,
        report.sequence,
        report.heard_session,
        report.heard_sequence,
        report.heard_mask,
        report.held_us,
        report.heard_padded,
    )


def encode_padded(padded: Padded) -> bytes:
    return _PADDED.pack(TAG, KIND_PADDED, padded.session, padded.number)


def decode(probe: bytes) -> Report | Padded | None:
    """What PROBE_BYTES say; None if it is nothing that this version knows. What may stand in a field one day
    (other flags, what is zero now) is ignored."""
    if len(probe) != PROBE_BYTES or probe[:3] != TAG:
        return None
    if probe[3] == KIND_REPORT:
        return _decode_report(probe)
    if probe[3] == KIND_PADDED:
        _, _, session, number = _PADDED.unpack(probe)
        return Padded(session, number)
    return None


def _decode_report(probe: bytes) -> Report | None:
    _, _, flags, multiplier, interval_ms, session, sequence, *heard = _REPORT.unpack(probe)
    heard_session, heard_sequence, mask, held_us, heard_padded = heard
    if session == 0 or interval_ms == 0 or multiplier == 0:
        return None
    return Report(
        session=session,
        sequence=sequence,
        interval_ms=interval_ms,
        detect_multiplier=multiplier,
        hears=flags & HEARS != 0,
        wants_answer=flags & ANSWER != 0,
        heard_session=heard_session,
        heard_sequence=heard_sequence,
        heard_mask=mask,
        held_us=held_us,
        heard_padded=heard_padded,
    )
