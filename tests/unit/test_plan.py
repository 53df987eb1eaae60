import pytest

from fastpath.offload.plan import plan

A, B = 1, 2


@pytest.mark.parametrize(
    ("datagrams", "runs"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(A, 1472)], [(0, 1, 1472)], id="one"),
        pytest.param([(A, 1472)] * 5, [(0, 5, 1472)], id="five of a size"),
        pytest.param([(A, 1472), (A, 1472), (A, 60)], [(0, 3, 1472)], id="the last is shorter"),
        pytest.param(
            [(A, 1472), (A, 60), (A, 60)], [(0, 2, 1472), (2, 1, 60)], id="a shorter one ends its run"
        ),
        pytest.param([(A, 60), (A, 1472)], [(0, 1, 60), (1, 1, 1472)], id="a longer one begins a run"),
        pytest.param([(A, 60), (B, 60)], [(0, 1, 60), (1, 1, 60)], id="another key begins a run"),
        pytest.param(
            [(A, 60), (B, 60), (A, 60)],
            [(0, 1, 60), (1, 1, 60), (2, 1, 60)],
            id="order is kept: no run reaches over another",
        ),
        pytest.param([(A, 100)] * 65, [(0, 64, 100), (64, 1, 100)], id="64 segments and one more"),
        pytest.param([(A, 1472)] * 45, [(0, 44, 1472), (44, 1, 1472)], id="65,507 bytes hold 44 of 1,472"),
        pytest.param([(A, 65_507)], [(0, 1, 65_507)], id="one that is all bytes there are"),
        pytest.param([(A, 32_753), (A, 32_753)], [(0, 2, 32_753)], id="65,506 bytes"),
        pytest.param(
            [(A, 32_754), (A, 32_754)], [(0, 1, 32_754), (1, 1, 32_754)], id="65,508 bytes are too many"
        ),
        pytest.param([(A, 32_754), (A, 32_753)], [(0, 2, 32_754)], id="65,507 bytes, the last shorter"),
    ],
)
def test_plan(datagrams: list[tuple[int, int]], runs: list[tuple[int, int, int]]) -> None:
    assert plan(datagrams) == runs


@pytest.mark.parametrize("cap", [1, 2, 63, 128])
def test_the_segment_cap_is_the_callers(cap: int) -> None:
    assert [run.segments for run in plan([(A, 60)] * (cap + 1), max_segments=cap)] == [cap, 1]
