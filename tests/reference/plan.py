"""Greedy grouping of datagrams into UDP_SEGMENT runs, one rule a line."""

from __future__ import annotations

MAX_BYTES = 65_507  # what one IPv4 datagram's 65,535 bytes leave for UDP payload


def plan(datagrams: list[tuple[int, int]], *, max_segments: int) -> list[tuple[int, int, int]]:
    """(first, count, size) for each run."""
    runs: list[list[tuple[int, int]]] = []
    for datagram in datagrams:
        if runs and _joins(runs[-1], datagram, max_segments):
            runs[-1].append(datagram)
        else:
            runs.append([datagram])
    grouped, first = [], 0
    for run in runs:
        grouped.append((first, len(run), run[0][1]))
        first += len(run)
    return grouped


def _joins(run: list[tuple[int, int]], datagram: tuple[int, int], max_segments: int) -> bool:
    key, size = run[0]
    return (
        datagram[0] == key
        and datagram[1] <= size
        and run[-1][1] == size  # a shorter one was the last
        and len(run) < max_segments
        and sum(length for _, length in run) + datagram[1] <= MAX_BYTES
    )
