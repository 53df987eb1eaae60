"""Follows a Kubernetes cluster's Services and EndpointSlices for the resolver."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final

from forwarder.discovery.backoff import Backoff
from forwarder.discovery.kube_client import AbsentError, GoneError, KubeClient, KubeError
from forwarder.garbage import many_objects
from forwarder.names.kubernetes import OLD_SLICES_PATH, SERVICES_PATH, SLICES_PATH, ServiceTable
from forwarder.names.records import Change

WATCH_SECONDS: Final = 45
"""As long as the peers' watch, for the same reason: one that a firewall has forgotten is silent."""

HASTY_SECONDS: Final = 1.0

log = logging.getLogger("podloom.names")


class KubeServices:
    """`tell` gets the changes, the first of them with everything there is. The last good state stays while
    the API server is away."""

    def __init__(
        self,
        client: KubeClient,
        tell: Callable[[Change], None],
        *,
        watch_seconds: int = WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._tell = tell
        self._watch_seconds = watch_seconds
        self._clock, self._sleep = clock, sleep
        self._table = ServiceTable()
        self._slices_path = SLICES_PATH
        self._refused: dict[str, str] = {}
        self._said = ""

    async def follow(self) -> None:
        """List both and watch both from there on, for ever; list again when the API has forgotten."""
        backoff = Backoff()
        while True:
            began = self._clock()
            try:
                with many_objects():
                    services, slices = await self._list()
                began = self._clock()
                async with asyncio.TaskGroup() as watches:
                    watches.create_task(self._watch(SERVICES_PATH, services, self._table.service_changed))
                    watches.create_task(self._watch(self._slices_path, slices, self._table.slice_changed))
            except* GoneError:
                pass
            except* KubeError as errors:
                self._log(f"the names of services are not up to date: {errors.exceptions[0]}")
            if self._clock() - began >= HASTY_SECONDS:
                backoff.reset()  # What was listed lasted; one that forgets at once is not asked faster.
            await self._sleep(backoff.next())

    async def _list(self) -> tuple[str, str]:
        # The slices first: a service of the second list is then not without those it had in the first.
        slices, slices_version = await self._list_slices()
        services, services_version = await self._client.objects(SERVICES_PATH)
        # In a thread: ten thousand of each are a second of reading.
        self._tell(await asyncio.to_thread(self._table.replace, services, slices))
        self._tell_refused()
        return services_version, slices_version

    async def _list_slices(self) -> tuple[list[dict[str, Any]], str]:
        """In the version that the server has, which may change while we run."""
        self._slices_path = SLICES_PATH
        try:
            return await self._client.objects(self._slices_path)
        except AbsentError:
            self._slices_path = OLD_SLICES_PATH
            return await self._client.objects(self._slices_path)

    async def _watch(
        self, collection: str, version: str, changed: Callable[[str, Mapping[str, Any]], Change]
    ) -> None:
        """From the version on, again from where it was when the watch ends or fails. Raises GoneError."""
        backoff = Backoff()
        while True:
            began = self._clock()
            try:
                watch = self._client.watch(version, self._watch_seconds, collection)
                async with aclosing(watch) as events:
                    async for event, one in events:
                        version = str(one["metadata"]["resourceVersion"])
                        if event != "BOOKMARK":
                            self._tell(changed(event, one))
                            self._tell_refused()
                self._said = ""
            except AbsentError as error:  # The server is of another version since.
                raise GoneError(str(error)) from None
            except (KubeError, LookupError, TypeError, ValueError) as error:  # an object may be anything
                self._log(f"the names of services are not up to date: {error}")
            if self._clock() - began >= HASTY_SECONDS:
                backoff.reset()
            else:
                await self._sleep(backoff.next())

    def _tell_refused(self) -> None:
        refused = dict(self._table.refused)
        for key, reason in refused.items():
            if self._refused.get(key) != reason:
                log.error("the name of %s is not up to date: %s", key, reason)
        self._refused = refused

    def _log(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.error("%s", text)
