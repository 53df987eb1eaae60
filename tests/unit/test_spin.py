"""When the pump looks for the next packet, and when it sleeps until it comes. Times are in microseconds."""

from __future__ import annotations

import pytest

from fastpath.spin import looks

STEP = 1
CLOSE, FAR = 30, 500
SLOW = 25  # from look to look, where another thread had the CPU


@pytest.mark.parametrize(
    ("waits", "counts"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(CLOSE, STEP)], [0], id="the first wait: nothing is known yet"),
        pytest.param([(CLOSE, STEP)] * 3, [0, 31, 31], id="packets that follow closely"),
        pytest.param([(CLOSE, STEP), (0, STEP)], [0, 1], id="a packet that is there already"),
        pytest.param([(FAR, STEP)] * 3, [0, 0, 0], id="packets far apart"),
        pytest.param(
            [(CLOSE, STEP), (FAR, STEP), (CLOSE, STEP), (CLOSE, STEP)],
            [0, 100, 0, 31],
            id="one that is late ends looking, until they follow closely again",
        ),
        pytest.param(
            [(CLOSE, STEP), (CLOSE, SLOW), (CLOSE, STEP)], [0, 1, 31], id="another thread had the CPU, once"
        ),
    ],
)
def test_looks(waits: list[tuple[int, int]], counts: list[int]) -> None:
    nanoseconds = [(gap * 1_000, step * 1_000) for gap, step in waits]
    assert looks(nanoseconds) == counts
    assert looks(nanoseconds, on=False) == [0] * len(waits)
