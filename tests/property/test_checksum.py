import random
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpath.offload.virtio import VirtioHeader, complete_checksum
from fastpath.wire.checksum import checksum, update16
from tests.reference import checksum as oracle

WORD = st.integers(0, 0xFFFF)


def at_alignment(data: bytes, alignment: int) -> bytes:
    """The same bytes beginning at another address; `checksum` reads any contiguous buffer."""
    return cast("bytes", memoryview(bytes(alignment) + data)[alignment:])


@pytest.mark.parametrize("filling", ["random", "all ones"])
def test_equals_the_oracle_at_each_length_and_alignment(filling: str) -> None:
    data = random.Random(1071).randbytes(2_100) if filling == "random" else b"\xff" * 2_100
    for length in range(len(data) + 1):
        expected = oracle.checksum(data[:length])
        for alignment in range(8):
            assert checksum(at_alignment(data[:length], alignment)) == expected, (length, alignment)


@pytest.mark.parametrize("length", [4_095, 4_096, 9_001, 65_535])
def test_equals_the_oracle_at_great_lengths(length: int) -> None:
    data = random.Random(length).randbytes(length)
    for alignment in range(8):
        assert checksum(at_alignment(data, alignment)) == oracle.checksum(data)


@given(st.binary(max_size=3_000), st.integers(0, 0xFFFF_FFFF))
def test_equals_the_oracle_with_an_initial_sum(data: bytes, initial: int) -> None:
    assert checksum(data, initial) == oracle.checksum(data, initial)


@given(st.binary(max_size=200).filter(lambda data: len(data) % 2 == 0), st.binary(max_size=200))
def test_sums_chain_at_even_lengths(first: bytes, second: bytes) -> None:
    assert checksum(second, 0xFFFF - checksum(first)) == checksum(first + second)


@given(st.lists(WORD, min_size=2, max_size=32), st.data())
def test_update16_equals_a_new_sum(words: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(words) - 1))
    new = data.draw(WORD)
    changed = [*words[:at], new, *words[at + 1 :]]
    before, after = (b"".join(word.to_bytes(2, "big") for word in each) for each in (words, changed))
    if not any(after):
        return  # all-zero data has two checksums, 0xffff and 0x0000; no IP header is all zero
    assert update16(checksum(before), words[at], new) == checksum(after)


@given(st.integers(14, 40), st.binary(min_size=2, max_size=300), st.data())
def test_complete_checksum_sums_from_any_start(start: int, summed: bytes, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, len(summed) - 2))
    frame = bytes(start) + summed
    expected = oracle.checksum(summed)
    if expected == 0 and offset == 6:
        expected = 0xFFFF
    finished = complete_checksum(VirtioHeader(1, 0, 0, 0, start, offset), frame)
    at = start + offset
    assert finished == frame[:at] + expected.to_bytes(2, "big") + frame[at + 2 :]
