from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastpath.offload.plan import plan
from tests.reference import plan as oracle

LENGTH = st.sampled_from([60, 1_472, 1_472, 1_472, 9_000, 32_754]) | st.integers(1, oracle.MAX_BYTES)
BATCH = st.lists(
    st.tuples(st.sampled_from([0, 1, (1 << 32) - 1]), LENGTH)
    # Bursts of one flow, as superframes make them: only these meet the caps.
    | st.tuples(st.just(1), st.just(1_472)),
    max_size=200,
).map(lambda drawn: drawn) | st.builds(
    lambda parts: [pair for pair, count in parts for _ in range(count)],
    st.lists(st.tuples(st.tuples(st.integers(0, 1), LENGTH), st.integers(1, 150)), max_size=6),
)


@given(BATCH, st.integers(1, 128))
def test_equals_the_oracle(datagrams: list[tuple[int, int]], max_segments: int) -> None:
    assert plan(datagrams, max_segments=max_segments) == oracle.plan(datagrams, max_segments=max_segments)


@given(BATCH, st.integers(1, 128))
def test_invariants(datagrams: list[tuple[int, int]], max_segments: int) -> None:
    runs = plan(datagrams, max_segments=max_segments)
    position = 0
    for run in runs:
        assert run.first == position, "nothing lost, doubled or moved"
        position += run.segments
        carried = datagrams[run.first : position]
        assert 1 <= run.segments <= max_segments
        assert sum(length for _, length in carried) <= oracle.MAX_BYTES
        assert len({key for key, _ in carried}) == 1
        assert all(length == run.size for _, length in carried[:-1])
        assert carried[-1][1] <= run.size
    assert position == len(datagrams)


@given(BATCH, st.integers(1, 128))
def test_no_two_neighbouring_runs_could_have_been_one(
    datagrams: list[tuple[int, int]], max_segments: int
) -> None:
    runs = plan(datagrams, max_segments=max_segments)
    for run, following in pairwise(runs):
        carried = datagrams[run.first : following.first]
        longer = [*carried, datagrams[following.first]]
        assert len(oracle.plan(longer, max_segments=max_segments)) == 2
