"""When bytes move in bulk."""

from __future__ import annotations

import pytest

from forwarder.bulk import BULK_BYTES_PER_SECOND, CALM_SECONDS, LOOK_SECONDS, Bulk

LITTLE = int(BULK_BYTES_PER_SECOND * LOOK_SECONDS / 2)
MUCH = 2 * LITTLE + 1

CALM_LOOKS = int(CALM_SECONDS / LOOK_SECONDS)


def looks(moved: list[int], apart: float = LOOK_SECONDS) -> list[bool]:
    """What each look says, if so many bytes moved since the one before."""
    bulk, total = Bulk(), 0
    said = []
    for number, count in enumerate(moved):
        total += count
        said.append(bulk.look(1000.0 + number * apart, total))
    return said


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        pytest.param([MUCH], [False], id="the first look: nobody knows since when"),
        pytest.param([0, MUCH, MUCH], [False, True, True], id="bulk"),
        pytest.param([0, LITTLE, LITTLE, LITTLE], [False] * 4, id="half as much"),
        pytest.param([0, MUCH, 0, MUCH], [False, True, True, True], id="a short lull changes nothing"),
    ],
)
def test_looks(moved: list[int], said: list[bool]) -> None:
    assert looks(moved) == said


def test_it_is_over_when_it_has_been_calm_for_long_enough() -> None:
    said = looks([0, MUCH] + [LITTLE] * 2 * CALM_LOOKS)
    assert said[1:CALM_LOOKS] == [True] * (CALM_LOOKS - 1)
    assert not any(said[CALM_LOOKS + 2 :])


def test_it_is_the_rate_that_counts() -> None:
    assert looks([0, MUCH], apart=2 * LOOK_SECONDS) == [False, False]
    assert looks([0, LITTLE], apart=LOOK_SECONDS / 3) == [False, True]


def test_it_says_whether_anything_moves() -> None:
    bulk = Bulk()
    assert [(bulk.look(float(n), total), bulk.moving)[1] for n, total in enumerate([5, 5, 6])] == [
        True,
        False,
        True,
    ]
