"""Where the other nodes' records come from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from forwarder.addresses import Network
from forwarder.config import Config
from forwarder.registry import Said


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything there is, by the key the source knows it by. Of two records that exclude each other the one
    that stands already does, or else the earlier."""

    said: Mapping[str, Said]


@dataclass(frozen=True, slots=True)
class Upsert:
    """One key is new, or says something else than before."""

    key: str
    said: Said


@dataclass(frozen=True, slots=True)
class Remove:
    key: str


@dataclass(frozen=True, slots=True)
class Current:
    """The source is heard again, and what it said last is all there is."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The source says nothing usable, a sentence for each reason; the last good peers stay."""

    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Announced:
    """Whether the others are told of this node: `fault` says why not, and is None if they are. `fenced` if
    its prefixes are another's, or may be by now: then no pod may get an address of them any more."""

    fault: str | None
    fenced: bool = False


Item: TypeAlias = Snapshot | Upsert | Remove | Current | Trouble | Announced


class Source(Protocol):
    """One way to learn of peers. Made anew when the configuration changes."""

    async def own_prefixes(self) -> tuple[Network, ...]:
        """What this node's pods get their addresses from, once that is known: the configuration's, or what
        the cluster gave this node."""

    def watch(self) -> AsyncIterator[Item]:
        """What is known now, at once; then whatever differs from it. Ends only by cancellation."""

    def relocate(self, config: Config) -> None:
        """This node has the endpoints of this configuration now: tell the others, and judge by them."""

    async def close(self) -> None:
        """Give back what the others opened, when they have ended."""
