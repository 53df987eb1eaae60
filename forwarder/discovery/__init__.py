"""Where the other nodes' records come from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from forwarder.peers import PeerRecord


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All peers there are, checked against each other and against this node."""

    peers: tuple[PeerRecord, ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """The source says nothing usable, a sentence for each reason; the last good peers stay."""

    faults: tuple[str, ...]


class Source(Protocol):
    """One way to learn of peers. Made anew when the configuration changes."""

    def watch(self) -> AsyncIterator[Snapshot | Trouble]:
        """What is known now, at once; then whatever differs from it. Ends only by cancellation."""
