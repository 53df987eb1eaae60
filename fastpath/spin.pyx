"""Python face of spinning, for tests."""


def looks(list waits not None, *, bint on=True):
    """Play waits, each (ns until a packet comes, ns from look to look); how many looks each got."""
    cdef Spin spin = Spin(on, False, 0, 0)
    cdef int64_t now = 0
    cdef int64_t comes
    cdef list counts = []
    for gap, step in waits:
        comes = now + gap
        count = 0
        looking = spin_begin(&spin, now)
        while looking:
            count += 1
            if now >= comes:
                break
            now += step
            looking = spin_again(&spin, now)
        now = max(now, comes)
        spin_end(&spin, now, True)
        counts.append(count)
    return counts
