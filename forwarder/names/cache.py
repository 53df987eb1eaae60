"""A cache bounded in bytes, the least recently used going first. Pure: time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

ENTRY_BYTES: Final = 300
"""What an entry takes beside its key and value: measured, a tuple with two floats and its place in a dict."""


class Entry(NamedTuple):
    """A value, and when it was put and ends."""

    value: bytes
    put_at: float
    ends_at: float


class Cache:
    """Values by key, each for its own time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        """The memory used, counted with ENTRY_BYTES for each entry."""
        return self._used_bytes

    def put(self, key: bytes, value: bytes, now: float, ttl_seconds: float) -> None:
        """Keep a value for that time; not at all if the time is none."""
        self._drop(key)
        if ttl_seconds <= 0:
            return
        self._entries[key] = Entry(value, now, now + ttl_seconds)
        self._used_bytes += _cost(key, value)
        while self._used_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, key: bytes, now: float) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.ends_at:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def clear(self) -> None:
        self._entries.clear()
        self._used_bytes = 0

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used_bytes -= _cost(key, entry.value)


def _cost(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
