"""Probes on the event loop: sent when health says so, heard by the pump, and news of peers for the log.

The clock is monotonic: no jump of the host's time reaches a decision.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from forwarder.dataplane import DataPlane
from forwarder.health import Health, PeerHealth, Send, State
from forwarder.paths import some
from forwarder.peers import OVERHEAD_BYTES
from forwarder.probe import PROBE_BYTES, decode

log = logging.getLogger("podloom")

MIN_PAUSE_SECONDS: Final = 0.02
MAX_PAUSE_SECONDS: Final = 0.1
"""Between two looks at who is due: those of many peers are served together."""

NOT_PROBED: Final[Mapping[str, Any]] = {"state": "not probed"}


class Probing:
    """Let `run` run. Peers are known by their node id here, by their slot in the fast path."""

    def __init__(self, dataplane: DataPlane, *, interval_seconds: float, detect_multiplier: int) -> None:
        self._dataplane = dataplane
        # It tells one life of the daemon from the next, and is no secret.
        self._health = Health(
            random.randrange(1, 1 << 32),  # noqa: S311
            random.random,
            interval_seconds=interval_seconds,
            detect_multiplier=detect_multiplier,
        )
        self._peers: dict[str, tuple[int, int]] = {}
        self._ids: dict[int, str] = {}
        dataplane.on_probes = self._hear

    def follow(self, node_id: str, slot: int, version: int) -> None:
        """Probe a peer from now on: its slot in the fast path, and the IP version of its endpoint."""
        self._peers[node_id] = slot, version
        self._ids[slot] = node_id
        self._health.add(node_id, time.monotonic())

    def forget(self, node_id: str) -> None:
        """Do not probe it any more, if it was."""
        if node_id in self._peers:
            slot, _ = self._peers.pop(node_id)
            del self._ids[slot]
            self._health.remove(node_id)

    def carried(self, node_id: str, path_mtu_bytes: int) -> int:
        """What the path carries, where the kernel says it is that much, outer IP header included."""
        self._health.limit(node_id, path_mtu_bytes)
        short = self._health.short_path_bytes(node_id)
        return path_mtu_bytes if short is None else min(short, path_mtu_bytes)

    def state(self, node_id: str) -> PeerHealth | None:
        """None for a peer that is not probed; times are `time.monotonic`'s."""
        return self._health.state(node_id, time.monotonic())

    def is_down(self, node_id: str) -> bool:
        """Whether it is probed and known not to be reached."""
        peer = self.state(node_id)
        return peer is not None and peer.state == State.DOWN

    async def run(self) -> None:
        while True:
            self._send(self._health.poll(time.monotonic()))
            self._tell(self._health.take_changes())
            next_at = self._health.next_at()
            pause = MAX_PAUSE_SECONDS if next_at is None else next_at - time.monotonic()
            await asyncio.sleep(min(max(pause, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS))

    def _hear(self, probes: Sequence[tuple[int, bytes]]) -> None:
        now = time.monotonic()
        for slot, probe in probes:
            node_id, message = self._ids.get(slot), decode(probe)
            if node_id is not None and message is not None:
                self._send(self._health.hear(node_id, message, now))

    def _send(self, sends: Iterable[Send]) -> None:
        for send in sends:
            slot, version = self._peers[send.peer_id]
            size_bytes = send.size_bytes or 0
            packet_bytes = max(size_bytes - OVERHEAD_BYTES[version], PROBE_BYTES)
            self._dataplane.send_probe(slot, send.flow, send.probe, packet_bytes)

    def _tell(self, changes: Mapping[str, State]) -> None:
        by_sentence: dict[str, list[str]] = {}
        for node_id in changes:
            peer = self.state(node_id)
            if peer is not None:
                by_sentence.setdefault(sentence(peer), []).append(node_id)
        for text, node_ids in by_sentence.items():
            level = logging.INFO if text == State.UP else logging.WARNING
            log.log(level, "%s: %s", text, some(node_ids))

    def describe(self, node_id: str) -> dict[str, Any]:
        """What `podloom peers` shows of it."""
        peer = self.state(node_id)
        if peer is None:
            return dict(NOT_PROBED)
        return {
            "state": str(peer.state),
            "fault": peer.fault,
            "since_seconds": round(time.monotonic() - peer.since, 3),
            "rtt_seconds": _rounded(peer.rtt_seconds),
            "smoothed_rtt_seconds": _rounded(peer.smoothed_rtt_seconds),
            "encap_loss": _rounded(peer.encap_loss),
            "decap_loss": _rounded(peer.decap_loss),
        }


def sentence(peer: PeerHealth) -> str:
    return f"{peer.state}, {peer.fault}" if peer.fault else str(peer.state)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
