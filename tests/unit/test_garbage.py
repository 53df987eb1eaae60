from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from forwarder.garbage import MANY, many_objects


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """What a test froze is garbage for the others again."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_nothing_is_searched_within_and_many_objects_never() -> None:
    with many_objects():
        assert not gc.isenabled()
        with many_objects():
            made = [[number] for number in range(2 * MANY)]
        assert not gc.isenabled(), "another block is under way"
        assert gc.get_freeze_count() == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


def test_few_objects_are_garbage_as_ever() -> None:
    gc.collect()
    with pytest.raises(ValueError, match="no record"), many_objects():
        raise ValueError("no record")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
