"""Puts the names of this node's pods into etcd, for the other nodes' resolvers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from forwarder.discovery.backoff import Backoff
from forwarder.discovery.etcd_client import EtcdClient, EtcdError, KeyValue, Put, Unchanged
from forwarder.discovery.registration import NODES, endpoints_of
from forwarder.names.etcd import PODS, pods_value
from forwarder.names.records import Pod

PAUSE_SECONDS: Final = 1.0
"""Between two puttings, however fast pods come and go."""

log = logging.getLogger("podloom.names")


class PodPublisher:
    """What it puts has the lease of this node's record, and goes with it. A node that is not registered,
    since another machine has its id or its prefix, names no pods."""

    def __init__(
        self,
        client: EtcdClient,
        root: str,
        node_id: str,
        endpoints: Sequence[str],
        *,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`endpoints` are those in this node's record, by which it is known to be ours."""
        self.node_id = node_id
        self._client = client
        self._record_key = f"{root}{NODES}{node_id}"
        self._key = f"{root}{PODS}{node_id}"
        self._endpoints = set(endpoints)
        self._sleep = sleep
        self._value = pods_value(())
        self._due = asyncio.Event()
        self._due.set()

    def relocate(self, endpoints: Sequence[str]) -> None:
        """This node is at these now; its record may have those of before for a while."""
        self._endpoints |= set(endpoints)

    def put(self, pods: Sequence[Pod]) -> None:
        """These are on this node now; the others are told soon."""
        self._value = pods_value(pods)
        self._due.set()

    def see(self, item: KeyValue | None) -> None:
        """This is there now. If it is not what was put, it is put again."""
        if item is None or item.value != self._value:
            self._due.set()

    async def run(self) -> None:
        """Put what is due, for ever."""
        backoff, said = Backoff(), ""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                done, fault = await self._put(), "this node is not registered"
            except EtcdError as error:
                done, fault = False, str(error)
            if done:
                backoff.reset()
                said = ""
                await self._sleep(PAUSE_SECONDS)
                continue
            if fault != said:
                said = fault
                log.warning("the other nodes are not told of this node's pods: %s", fault)
            self._due.set()
            await self._sleep(backoff.next())

    async def _put(self) -> bool:
        """Whether our record is there, and the pods with it."""
        found, _ = await self._client.list(self._record_key)
        record = next((item for item in found if item.key == self._record_key), None)
        if record is None or not endpoints_of(record.value) <= self._endpoints:
            return False
        unchanged = Unchanged(record.key, record.modified)
        return await self._client.commit([unchanged], [Put(self._key, self._value, record.lease)])
