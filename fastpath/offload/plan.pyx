"""Python face of run planning, for tests and benches."""

import collections

PlannedRun = collections.namedtuple("PlannedRun", ["first", "segments", "size"])


def plan(list datagrams not None, *, int max_segments=RUN_MAX_SEGMENTS):
    """Group (flow key, length) datagrams, in order, into runs that one UDP_SEGMENT send can carry."""
    cdef Run run = Run(0, 0, 0, 0, False)
    cdef int first = 0
    cdef list runs = []
    for i, (key, length) in enumerate(datagrams):
        if run.count and run_accepts(&run, key, length, max_segments):
            run_extend(&run, length)
            continue
        if run.count:
            runs.append(PlannedRun(first, run.count, run.size))
        run_begin(&run, key, length)
        first = i
    if run.count:
        runs.append(PlannedRun(first, run.count, run.size))
    return runs
