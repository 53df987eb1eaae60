"""The clock that nobody sets and that goes on while the host sleeps."""

from __future__ import annotations

import time


def boot_seconds() -> float:
    """Since the host booted (CLOCK_BOOTTIME). What others measure on their machines, as a lease, is over in
    this time whether we slept or not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
