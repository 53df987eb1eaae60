"""Keeps the interpreter's search for garbage from stopping packets."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MANY: Final = 50_000
"""Objects; to look at so many takes some 20 ms."""

_under_way = 0


@contextmanager
def many_objects() -> Iterator[None]:
    """For a block that may make records by the thousand, which then stay; on the event loop only.

    A full search looks at every object there is while no thread runs: two seconds with a hundred thousand
    records. There is none in the block, and if it made many objects no search looks at them later: what is
    not used any more is freed as ever, but for cycles, which records are not part of."""
    global _under_way
    _under_way += 1
    gc.disable()
    try:
        yield
    finally:
        _under_way -= 1
        if _under_way == 0:
            if gc.get_count()[0] > MANY:
                gc.freeze()
            gc.enable()
