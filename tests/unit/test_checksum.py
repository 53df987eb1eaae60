import pytest

from fastpath.wire.checksum import checksum, update16

CASES = {
    "RFC 1071 section 3, the worked example": ("0001f203f4f5f6f7", 0x220D),
    "an IPv4 header with its field zero": ("45000073000040004011" + "0000" + "c0a80001c0a800c7", 0xB861),
    "the same header with its field filled sums to nothing": (
        "45000073000040004011" + "b861" + "c0a80001c0a800c7",
        0,
    ),
    "no bytes": ("", 0xFFFF),
    "one byte is the high half of a word": ("ab", 0xFFFF - 0xAB00),
    "three bytes": ("000100", 0xFFFE),
    "a carry out of the top goes back in below": ("ffff0001", 0xFFFE),
    "all ones": ("ff" * 64, 0),
    "all zeroes": ("00" * 64, 0xFFFF),
}


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
def test_checksum(data: str, expected: int) -> None:
    assert checksum(bytes.fromhex(data)) == expected


def test_initial_is_an_uncomplemented_sum_of_what_came_before() -> None:
    before, after = bytes.fromhex("0001f203"), bytes.fromhex("f4f5f6f7")
    assert checksum(after, 0xFFFF - checksum(before)) == checksum(before + after)


@pytest.mark.parametrize("initial", [0x1_0000, 0xFFFF_FFFF, 0x1_2345_6789])
def test_initial_may_be_wider_than_sixteen_bits(initial: int) -> None:
    assert checksum(b"", initial) == 0xFFFF - (initial % 0xFFFF or 0xFFFF)


def test_a_long_run_of_ones_loses_no_carry() -> None:
    assert checksum(b"\xff\xff" * 32_768) == 0


@pytest.mark.parametrize(
    ("before", "old", "new", "after"),
    [
        pytest.param(0xDD2F, 0x5555, 0x3285, 0x0000, id="RFC 1624 section 4: not 0xffff"),
        pytest.param(0xB861, 0x4011, 0x3F11, 0xB961, id="TTL 64 to 63"),
        pytest.param(0xB861, 0x4500, 0x4503, 0xB85E, id="ECN Not-ECT to CE"),
        pytest.param(0xB861, 0x4500, 0x4500, 0xB861, id="no change"),
    ],
)
def test_update16(before: int, old: int, new: int, after: int) -> None:
    assert update16(before, old, new) == after
