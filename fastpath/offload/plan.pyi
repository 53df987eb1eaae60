from typing import NamedTuple

class PlannedRun(NamedTuple):
    first: int
    """Index of the run's first datagram."""
    segments: int
    size: int
    """Bytes of each datagram but the last, which may be shorter."""

def plan(datagrams: list[tuple[int, int]], *, max_segments: int = 64) -> list[PlannedRun]:
    """Group (flow key, length) datagrams, in order, into runs that one UDP_SEGMENT send can carry:
    one key, equal sizes but a shorter last, at most `max_segments` and 65,507 bytes."""
