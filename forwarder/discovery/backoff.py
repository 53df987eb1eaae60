"""How long to wait before the next try. Pure but for chance, which is an argument."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Doubling waits from `first` to `most` seconds, each drawn from its upper half, so that nodes which lost
    the same server do not come back in step."""

    first: float = 0.2
    most: float = 3.0
    chance: random.Random = field(default_factory=random.Random)
    _ceiling: float = 0.0

    def next(self) -> float:
        """Seconds to wait now."""
        self._ceiling = min(self.most, self._ceiling * 2 or self.first)
        return self._ceiling * self.chance.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked."""
        self._ceiling = 0.0
