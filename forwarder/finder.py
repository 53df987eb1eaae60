"""Roaming on the event loop: hellos sent, what comes heard, and peers moved to where they proved to be."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from forwarder.dataplane import DataPlane, RoamingProbe
from forwarder.neighbourhood import Neighbourhood
from forwarder.process import StartError
from forwarder.roaming import MIN_KEY_BYTES, Answer, Roaming

PAUSE_SECONDS: Final = 0.1
"""Between two looks at what came. So anybody can make us check some hundred MACs a second, and no more."""


def read_key(path: Path) -> bytes:
    """The cluster's key, without white space around it. StartError if it cannot be used."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read().strip()
    except OSError as error:
        raise StartError(f"health.key_file = {path}: cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise StartError(f"health.key_file = {path}: others may read it; chmod 600 {path}")
    if len(key) < MIN_KEY_BYTES:
        raise StartError(
            f"health.key_file = {path}: {len(key)} bytes; must be at least {MIN_KEY_BYTES} bytes, "
            "such as `head -c 32 /dev/urandom | base64` gives"
        )
    return key


class Finder:
    """Let `run` run."""

    def __init__(self, roaming: Roaming, dataplane: DataPlane, neighbourhood: Neighbourhood) -> None:
        self._roaming = roaming
        self._dataplane = dataplane
        self._neighbourhood = neighbourhood

    async def run(self) -> None:
        self._dataplane.hear_roaming()
        while True:
            now = time.monotonic()
            for peer_id, probe in self._roaming.hellos(now):
                path = self._neighbourhood.path_to(peer_id)
                if path is not None:
                    self._dataplane.send_from_home(path, path.endpoint, path.port, probe)
            for heard in self._dataplane.take_roaming():
                self._hear(heard, now)
            await asyncio.sleep(PAUSE_SECONDS)

    def _hear(self, heard: RoamingProbe, now: float) -> None:
        near = self._neighbourhood
        outcome = self._roaming.hear(
            heard.probe,
            (heard.address, heard.port),
            lambda: near.in_slot(heard.slot),
            near.places_of,
            now,
        )
        if outcome is None:
            return
        path = near.path_to(outcome.peer_id)
        if path is None or path.encapsulation != heard.encapsulation:
            return  # the port it came from is not the one that we would send to
        if isinstance(outcome, Answer):
            self._dataplane.send_from_home(path, *outcome.place, outcome.probe)
        else:
            near.move(outcome.peer_id, outcome.place)
