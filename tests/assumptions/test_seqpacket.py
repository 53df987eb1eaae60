"""An AF_UNIX seqpacket pair behaves like a TAP for reads and writes, so the pump is tested without root."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        for end in (one, other):
            end.setblocking(False)
        yield one.fileno(), other.fileno()


def test_one_read_is_one_write(pair: tuple[int, int]) -> None:
    os.write(pair[0], b"first")
    os.write(pair[0], b"second")
    assert [os.read(pair[1], 100), os.read(pair[1], 100)] == [b"first", b"second"]


def test_a_short_buffer_truncates_and_the_rest_is_lost(pair: tuple[int, int]) -> None:
    os.write(pair[0], b"truncated")
    os.write(pair[0], b"next")
    assert [os.read(pair[1], 5), os.read(pair[1], 100)] == [b"trunc", b"next"]


def test_writev_gathers_and_readv_scatters_one_frame(pair: tuple[int, int]) -> None:
    os.writev(pair[0], [b"header", b"frame"])
    header, frame = bytearray(6), bytearray(100)
    assert os.readv(pair[1], [header, frame]) == 11
    assert (bytes(header), bytes(frame[:5])) == (b"header", b"frame")


def test_an_empty_pair_says_try_again(pair: tuple[int, int]) -> None:
    with pytest.raises(BlockingIOError):
        os.read(pair[1], 100)


def test_a_full_pair_says_try_again(pair: tuple[int, int]) -> None:
    """What a TAP never does on write, but what a test of the TAP_FULL drop needs."""
    with pytest.raises(BlockingIOError):
        _fill(pair[0])


def _fill(descriptor: int) -> None:
    for _ in range(1_000_000):
        os.write(descriptor, bytes(1000))
