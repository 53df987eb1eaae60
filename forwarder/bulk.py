"""Whether bytes move in bulk. Pure: looks at a count of them, now and then.

What is dear for each packet and cheap for each byte pays then, and otherwise not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOOK_SECONDS: Final = 0.05
"""From look to look, while anything moves."""

BULK_BYTES_PER_SECOND: Final = 300e6

CALM_SECONDS: Final = 0.3
"""So long after the last look that saw bulk it is over."""


@dataclass(slots=True)
class Bulk:
    on: bool = False
    moving: bool = False  # anything moved since the look before
    seen_bytes: int = 0
    looked: float = float("-inf")
    busy: float = float("-inf")

    def look(self, now: float, total_bytes: int) -> bool:
        """Whether bytes move in bulk now, in seconds of a clock that nobody sets. The count only grows."""
        moved = total_bytes - self.seen_bytes
        if moved >= BULK_BYTES_PER_SECOND * (now - self.looked):
            self.busy = now
        self.moving = moved > 0
        self.seen_bytes, self.looked = total_bytes, now
        self.on = now - self.busy < CALM_SECONDS
        return self.on
