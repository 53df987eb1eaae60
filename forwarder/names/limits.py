"""Who may ask, and how often. Pure: time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from ipaddress import ip_address
from typing import Final

from forwarder.addresses import Network

BURST_SECONDS: Final = 1.0
"""How much of its rate a source may use at once."""

MAX_SOURCES: Final = 4096
"""Sources remembered. Whoever is forgotten starts with a full bucket, so more pods than this are no harm."""

OUTSIDER: Final = ""
"""All who may not ask share one bucket: their addresses may be invented."""


class Verdict(Enum):
    SERVE = "serve"
    REFUSE = "refuse"
    DROP = "drop"


class Limiter:
    """A token bucket for each source address."""

    def __init__(self, clients: Sequence[Network], queries_per_second: float) -> None:
        """`clients` are those who may ask."""
        self._clients = tuple(clients)
        self._rate = queries_per_second
        self._burst = max(queries_per_second * BURST_SECONDS, 1.0)
        # By source: is it a client, its tokens, and when they were counted.
        self._buckets: OrderedDict[str, tuple[bool, float, float]] = OrderedDict()

    def judge(self, source: str, now: float) -> Verdict:
        """What to do with a query; a served or refused one takes a token."""
        bucket = self._buckets.get(source)
        if bucket is None and not self._is_client(source):
            source = OUTSIDER
            bucket = self._buckets.get(source)
        client, tokens, counted_at = bucket or (source != OUTSIDER, self._burst, now)
        tokens = min(tokens + max(now - counted_at, 0.0) * self._rate, self._burst)
        admitted = tokens >= 1.0
        self._buckets[source] = client, tokens - 1.0 if admitted else tokens, now
        self._buckets.move_to_end(source)
        if len(self._buckets) > MAX_SOURCES:
            self._buckets.popitem(last=False)
        if not admitted:
            return Verdict.DROP
        return Verdict.SERVE if client else Verdict.REFUSE

    def _is_client(self, source: str) -> bool:
        try:
            address = ip_address(source)
        except ValueError:
            return False
        return any(address in network for network in self._clients)
