"""Everything below a prefix of etcd's keys, and then whatever changes, through whatever happens to etcd."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from forwarder.discovery.backoff import Backoff
from forwarder.discovery.etcd_client import CompactedError, Deleted, EtcdClient, EtcdError, KeyValue
from forwarder.garbage import many_objects

SILENCE_SECONDS: Final = 45.0
"""A watch that says nothing for so long is opened again where it was: behind a firewall that forgot the
connection it would be silent for ever."""

HASTY_SECONDS: Final = 1.0
"""A watch that ends sooner counts as a failure, so that opening it again is no hot loop."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Everything there is, oldest creation first."""

    found: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    change: KeyValue | Deleted


@dataclass(frozen=True, slots=True)
class Unheard:
    """etcd does not answer; said once, until it does."""

    fault: str


@dataclass(frozen=True, slots=True)
class HeardAgain:
    """etcd answers again, and what it said last, with what changed meanwhile, is all there is."""


Word: TypeAlias = Listed | Changed | Unheard | HeardAgain


async def follow(
    client: EtcdClient,
    prefix: str,
    *,
    silence_seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[Any]],
) -> AsyncGenerator[Word, None]:
    """List, then watch from there on; again from where it was when the watch ends. Never ends by itself."""
    backoff = Backoff()
    revision: int | None = None
    troubled = False
    while True:
        began = clock()
        try:
            if revision is None:
                with many_objects():
                    found, revision = await client.list(prefix)
                    troubled = False
                    yield Listed(found)
                    del found  # It may be a hundred thousand, and a watch lasts for ever.
            async with aclosing(client.watch(prefix, revision + 1, silence_seconds)) as watch:
                async for progress in watch:
                    if troubled:
                        troubled = False
                        yield HeardAgain()
                    for change in progress.changes:
                        yield Changed(change)
                    revision = max(revision, progress.revision)
            if clock() - began >= HASTY_SECONDS:
                backoff.reset()
                continue
        except CompactedError:
            revision = None  # Changes were forgotten before they were read.
        except EtcdError as error:
            if not troubled:
                troubled = True
                yield Unheard(str(error))
        if clock() - began >= HASTY_SECONDS:
            backoff.reset()
        await sleep(backoff.next())
