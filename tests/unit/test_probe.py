from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.probe import (
    MAX_HELD_US,
    MAX_INTERVAL_MS,
    PROBE_BYTES,
    Padded,
    Report,
    decode,
    encode_padded,
    encode_report,
)

WORD = st.integers(0, (1 << 32) - 1)
REPORTS = st.builds(
    Report,
    session=st.integers(1, (1 << 32) - 1),
    sequence=WORD,
    interval_ms=st.integers(1, MAX_INTERVAL_MS),
    detect_multiplier=st.integers(1, 255),
    hears=st.booleans(),
    wants_answer=st.booleans(),
    heard_session=WORD,
    heard_sequence=WORD,
    heard_mask=st.integers(0, (1 << 64) - 1),
    held_us=st.integers(0, MAX_HELD_US),
    heard_padded=WORD,
)

REPORT = Report(
    session=0x01020304,
    sequence=0x05060708,
    interval_ms=1000,
    detect_multiplier=3,
    hears=True,
    wants_answer=True,
    heard_session=0x11121314,
    heard_sequence=0x15161718,
    heard_mask=0x2122232425262728,
    held_us=0x31323334,
    heard_padded=0x41424344,
)


def test_a_report_on_the_wire() -> None:
    expected = bytes.fromhex(
        "706c0101 03 03 03e8 01020304 05060708 11121314 15161718 2122232425262728 31323334 41424344"
    )
    assert encode_report(REPORT) == expected.ljust(PROBE_BYTES, b"\0")


def test_a_padded_probe_on_the_wire() -> None:
    expected = bytes.fromhex("706c0102 01020304 05060708")
    assert encode_padded(Padded(0x01020304, 0x05060708)) == expected.ljust(PROBE_BYTES, b"\0")


@given(REPORTS)
def test_each_report_survives(report: Report) -> None:
    assert decode(encode_report(report)) == report


@given(WORD, WORD)
def test_each_padded_probe_survives(session: int, number: int) -> None:
    assert decode(encode_padded(Padded(session, number))) == Padded(session, number)


@given(st.binary(max_size=PROBE_BYTES + 8) | st.binary(min_size=61, max_size=61).map(lambda b: b"pl\x01" + b))
def test_junk_is_nothing_or_in_range(probe: bytes) -> None:
    message = decode(probe)
    if isinstance(message, Report):
        assert message.session
        assert message.interval_ms
        assert message.detect_multiplier


@given(REPORTS, st.integers(0, PROBE_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_another_report_or_none(report: Report, at: int, flip: int) -> None:
    probe = bytearray(encode_report(report))
    probe[at] ^= flip
    decode(bytes(probe))


@pytest.mark.parametrize(
    ("what", "probe"),
    [
        ("nothing", b""),
        ("too short", encode_report(REPORT)[:-1]),
        ("too long", encode_report(REPORT) + b"\0"),
        ("another's subtype", b"xx\x01" + encode_report(REPORT)[3:]),
        ("a version to come", b"pl\x02" + encode_report(REPORT)[3:]),
        ("a kind to come", b"pl\x01\x03" + encode_report(REPORT)[4:]),
        ("no session", encode_report(dataclasses.replace(REPORT, session=0))),
        ("no interval", encode_report(dataclasses.replace(REPORT, interval_ms=0))),
        ("no multiplier", encode_report(dataclasses.replace(REPORT, detect_multiplier=0))),
    ],
)
def test_what_is_no_probe(what: str, probe: bytes) -> None:
    assert decode(probe) is None


def test_what_is_zero_now_may_be_used_later() -> None:
    probe = bytearray(encode_report(REPORT))
    probe[4] |= 0xFC
    probe[-24:] = b"\xff" * 24
    assert decode(bytes(probe)) == REPORT
