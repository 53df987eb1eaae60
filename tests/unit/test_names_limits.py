from __future__ import annotations

from ipaddress import ip_network

import pytest

from forwarder.names.cache import ENTRY_BYTES, Cache
from forwarder.names.limits import MAX_SOURCES, Limiter, Verdict

CLIENTS = (ip_network("10.42.1.0/24"), ip_network("fd42::/64"))


def test_a_source_has_its_rate_and_a_burst() -> None:
    limiter = Limiter(CLIENTS, 10)
    verdicts = [limiter.judge("10.42.1.5", 100.0) for _ in range(12)]
    assert verdicts == [Verdict.SERVE] * 10 + [Verdict.DROP] * 2
    assert limiter.judge("10.42.1.6", 100.0) is Verdict.SERVE, "another source has its own"
    assert limiter.judge("10.42.1.5", 100.125) is Verdict.SERVE
    assert limiter.judge("10.42.1.5", 100.125) is Verdict.DROP
    assert limiter.judge("10.42.1.5", 99.0) is Verdict.DROP, "time that runs back gives nothing"


@pytest.mark.parametrize("source", ["10.42.2.5", "fd42:1::1", "fe80::1%loom0", "nonsense"])
def test_outsiders_are_refused_and_share_one_rate(source: str) -> None:
    limiter = Limiter(CLIENTS, 2)
    assert limiter.judge(source, 0.0) is Verdict.REFUSE
    assert limiter.judge("192.0.2.77", 0.0) is Verdict.REFUSE
    assert limiter.judge(source, 0.0) is Verdict.DROP
    assert limiter.judge("192.0.2.78", 0.0) is Verdict.DROP
    assert limiter.judge("fd42::7", 0.0) is Verdict.SERVE


def test_the_sources_remembered_are_bounded() -> None:
    limiter = Limiter((ip_network("10.0.0.0/8"),), 1)
    for number in range(MAX_SOURCES + 10):
        limiter.judge(f"10.0.{number >> 8}.{number & 255}", 0.0)
    assert len(limiter._buckets) == MAX_SOURCES
    assert limiter.judge("10.0.15.255", 0.0) is Verdict.DROP, "the latest are remembered"
    assert limiter.judge("10.0.0.0", 0.0) is Verdict.SERVE, "the eldest begins anew"


def test_an_entry_ends() -> None:
    cache = Cache(10_000)
    cache.put(b"key", b"value", 100.0, 5)
    entry = cache.get(b"key", 104.9)
    assert entry is not None
    assert (entry.value, entry.put_at) == (b"value", 100.0)
    assert cache.get(b"key", 105.0) is None
    assert (len(cache), cache.used_bytes) == (0, 0)


def test_what_lasts_no_time_is_not_kept_and_ends_what_was() -> None:
    cache = Cache(10_000)
    cache.put(b"key", b"value", 100.0, 5)
    cache.put(b"key", b"newer", 101.0, 0)
    assert cache.get(b"key", 101.0) is None


def test_memory_is_bounded_and_the_least_used_goes() -> None:
    cache = Cache(3 * (ENTRY_BYTES + 11))
    for number in range(3):
        cache.put(b"%d" % number, bytes(10), 0.0, 60)
    assert cache.get(b"0", 1.0) is not None
    cache.put(b"3", bytes(10), 1.0, 60)
    assert [cache.get(b"%d" % number, 1.0) is not None for number in range(4)] == [True, False, True, True]
    cache.put(b"big", bytes(10_000), 1.0, 60)
    assert (len(cache), cache.used_bytes) == (0, 0), "what is too big for all of it is not kept"
    cache.put(b"a", b"b", 0.0, 60)
    cache.clear()
    assert (len(cache), cache.used_bytes) == (0, 0)
