"""What a path carries, found out by padded probes where nobody says "too big". Pure, and without a clock.

After packetization-layer path MTU discovery for datagrams (RFC 8899): a size that is lost three times in a
row, while what was sent behind it arrived, does not fit; then sizes between the floor and it are tried. Sizes
are of the outer packet, IP header included.
"""

from __future__ import annotations

from typing import Final

TRIES: Final = 3
"""Losses in a row that make a size too big (RFC 8899 section 5.1.2, MAX_PROBES), or passages in a row that
make the ceiling sound again."""

RAISE_LOSSES: Final = 60
"""Of the ceiling, after which what lies below it is searched anew: the path may have grown a little (RFC 8899
section 5.1.1, PMTU_RAISE_TIMER). With the default interval about ten minutes."""


class PathSearch:
    """Ask for `size_bytes`, send that, and say whether it `passed` or was `lost`.

    The ceiling is what the kernel lets through; it is taken to pass until it is known not to."""

    def __init__(self, ceiling_bytes: int, floor_bytes: int) -> None:
        self._ceiling = ceiling_bytes
        self._floor = floor_bytes
        self._short: int | None = None
        self._search: tuple[int, int] | None = None  # the greatest that passes, the least that does not
        self._losses = 0  # of the present size, in a row
        self._passages = 0  # of the ceiling, in a row, while short
        self._ceiling_losses = 0  # since the last search, while short
        self._ceiling_is_next = False  # while short, by turns

    @property
    def short_bytes(self) -> int | None:
        """What the path carries, where that is less than the ceiling."""
        return self._short

    @property
    def is_urgent(self) -> bool:
        """Whether something was noticed that the next probes will settle."""
        return self._search is not None or self._losses > 0 or self._passages > 0

    @property
    def size_bytes(self) -> int:
        """The size to try next."""
        if self._search is not None:
            low, high = self._search
            return (low + high) // 2
        if self._short is None or self._ceiling_is_next or self._passages:
            return self._ceiling
        return self._short

    def limit(self, ceiling_bytes: int) -> None:
        """The kernel lets that through from now on. What it knows, it need not be searched for."""
        if ceiling_bytes == self._ceiling:
            return
        self._ceiling = ceiling_bytes
        self._begin(None)
        if self._short is not None and self._short >= ceiling_bytes:
            self._short = None

    def passed(self, size_bytes: int) -> None:
        self._losses = 0
        if self._search is not None:
            low, high = self._search
            self._narrow(max(low, size_bytes), high)
        elif self._short is None:
            pass
        elif size_bytes < self._ceiling:
            self._ceiling_is_next = True
        else:
            self._passages += 1
            if self._passages == TRIES:
                self._short, self._passages = None, 0

    def lost(self, size_bytes: int) -> None:
        if self._search is None and self._short is not None and size_bytes >= self._ceiling:
            self._lost_ceiling()  # as expected
            return
        self._losses += 1
        if self._losses < TRIES:
            return
        if self._search is not None:
            low, high = self._search
            self._losses = 0
            self._narrow(low, min(high, size_bytes))
        else:
            self._begin((self._floor, size_bytes))

    def _lost_ceiling(self) -> None:
        self._passages = 0
        self._ceiling_is_next = False
        self._ceiling_losses += 1
        if self._ceiling_losses == RAISE_LOSSES and self._short is not None:
            self._begin((self._short, self._ceiling))

    def _begin(self, search: tuple[int, int] | None) -> None:
        self._search = search
        self._losses = self._passages = self._ceiling_losses = 0
        self._ceiling_is_next = False
        if search is not None:
            self._narrow(*search)

    def _narrow(self, low: int, high: int) -> None:
        """The search's range, or its end: the floor is taken to pass, since nothing can be done below it."""
        self._search = (low, high) if high - low > 1 else None
        if self._search is None:
            self._ceiling_is_next = True
            self._short = low if low < self._ceiling else None
