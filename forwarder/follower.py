"""Follows the source of peers: applies what it says, keeps what stands on disk, and tells how old it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from forwarder.boot_clock import boot_seconds
from forwarder.config import Config
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Source, Trouble, Upsert, stored
from forwarder.discovery.stored import Stored
from forwarder.neighbourhood import Neighbourhood

log = logging.getLogger("podloom")

SAVE_SECONDS: Final = 1.0
"""Between two writings of the peers to disk, at least."""

SAVE_PAUSES: Final = 50
"""As many times as long as a writing took, no other begins: all peers are written for the sake of one, and
with thousands of them some are always changing."""


@dataclass(slots=True)
class DiscoveryState:
    """What `status` shows of the source. `updated_at` is when it was heard last; `stored_at`, in Unix time,
    is set while the peers are those kept on disk; `unannounced` says why the others are not told of us, and
    `fenced` is whether no pod may be added for that reason."""

    updated_at: float | None = None
    stored_at: float | None = None
    trouble: str | None = None
    unannounced: str | None = None
    fenced: bool = False


class Follower:
    """`recall` the peers of last time, `follow` a source, `unfollow` it, `save` what stands at the end."""

    def __init__(
        self,
        config: Config,
        neighbourhood: Neighbourhood,
        unsaved: asyncio.Event,
        on_failure: Callable[[Exception], None],
        on_fence: Callable[[str], None],
    ) -> None:
        """`unsaved` is set while other records stand than are kept. `on_failure` is called when following
        ends by an error of ours; `on_fence` with why no pod may be added, "" if one may."""
        self._config = config
        self._neighbourhood = neighbourhood
        self._unsaved = unsaved
        self._on_failure = on_failure
        self._on_fence = on_fence
        self._state = DiscoveryState()
        self._following: asyncio.Task[None] | None = None

    def recall(self, kept: Stored | None) -> None:
        """Begin with the peers of last time, until the source is heard."""
        if kept is not None:
            self._state.stored_at = kept.saved_at
            self._neighbourhood.recall(kept.said)

    async def follow(self, source: Source, config: Config) -> None:
        """Start following a source; returns when its first word has been applied, or at once if the
        peers of last time are there to go on with."""
        self._config = config
        self._state.unannounced = None
        first = asyncio.Event()
        self._source = source
        self._following = asyncio.create_task(self._apply_from(source, first.set))
        self._following.add_done_callback(self._ended)
        if self._state.stored_at is None:
            await first.wait()

    def relocate(self, config: Config) -> None:
        """This node has the endpoints of this configuration now: the others are to be told."""
        self._config = config
        self._source.relocate(config)

    async def unfollow(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
            await self._source.close()
            self._following = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _apply_from(self, source: Source, applied: Callable[[], None]) -> None:
        try:
            async for item in source.watch():
                await self._apply(item)
                if not isinstance(item, Announced):
                    applied()
        finally:
            applied()

    async def _apply(self, item: Item) -> None:
        state, now = self._state, boot_seconds()
        match item:
            case Announced(fault, fenced):
                if fault is not None and fault != state.unannounced:
                    log.error("%s", fault)
                state.unannounced, state.fenced = fault, fenced
                self._on_fence(fault if fault is not None and fenced else "")
                return
            case Trouble(faults):
                for fault in faults:
                    log.error("peers not changed: %s", fault)
                state.trouble = "; ".join(faults)
                return
            case Current():
                pass
            case Snapshot(said):
                await self._neighbourhood.replace(said)
                self._unsaved.set()
            case Upsert(key, said):
                self._neighbourhood.upsert(key, said)
            case Remove(key):
                self._neighbourhood.remove(key)
        state.updated_at, state.stored_at, state.trouble = now, None, None
        self._neighbourhood.tell_refusals()

    # The peers on disk

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Keep what stands as it changes."""
        task = asyncio.create_task(self._save_changes())
        try:
            yield
        finally:
            task.cancel()

    async def _save_changes(self) -> None:
        while True:
            await self._unsaved.wait()
            began = time.monotonic()
            await self.save()
            await asyncio.sleep(max(SAVE_SECONDS, SAVE_PAUSES * (time.monotonic() - began)))

    async def save(self) -> None:
        """Keep what stands, if the source said so and it is not kept yet."""
        if not self._unsaved.is_set() or self._state.updated_at is None:
            return
        self._unsaved.clear()
        config = self._config
        records = list(self._neighbourhood.records.values())
        try:
            await asyncio.to_thread(
                stored.write,
                config.node.state_dir,
                config.discovery.source,
                time.time(),
                config.node.prefixes,
                records,
            )
        except OSError as error:
            log.warning("the peers are not kept in %s: %s", config.node.state_dir, error.strerror)

    # What people ask

    def describe(self) -> dict[str, Any]:
        """The source and how old its word is, for `podloom status`."""
        state, age = self._state, None
        if state.stored_at is not None:
            age = max(0.0, time.time() - state.stored_at)
        elif state.updated_at is not None:
            age = boot_seconds() - state.updated_at
        return {
            "source": self._config.discovery.source,
            "stored": state.stored_at is not None,
            "age_seconds": None if age is None else round(age, 3),
            "fault": state.trouble or "; ".join(self._neighbourhood.refusals) or None,
            "unannounced": state.unannounced,
            "fenced": state.fenced,
        }
