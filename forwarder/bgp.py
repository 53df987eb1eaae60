"""Keeps BIRD's include file to this node's prefixes, and has BIRD read it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from forwarder import bird
from forwarder.addresses import Network
from forwarder.bird import BirdError

log = logging.getLogger("podloom")

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 30.0
"""Between two tries to reach BIRD."""


class Speaker:
    """Hands over our prefixes. What BIRD makes of them, and of others', is in bird.conf."""

    def __init__(self, include: Path, control_socket: Path, bridge: str) -> None:
        self.fault: str | None = "BIRD was not told yet"
        """Why BIRD does not have what it should; None if it does."""
        self._include = include
        self._control_socket = control_socket
        self._bridge = bridge

    async def announce(self, prefixes: Sequence[Network]) -> None:
        """Return when BIRD has these; it is tried until then. A BIRD that starts later reads them itself."""
        pause = FIRST_PAUSE_SECONDS
        while not await self._tell(prefixes):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        log.info("BIRD has %s", ", ".join(map(str, prefixes)))

    async def withdraw(self) -> None:
        """Try once."""
        await self._tell(())

    async def _tell(self, prefixes: Sequence[Network]) -> bool:
        try:
            await asyncio.to_thread(write, self._include, bird.include(prefixes, self._bridge))
            await bird.configure(self._control_socket)
        except OSError as error:
            fault = f"bgp.include cannot be written: {self._include}: {error.strerror}"
        except BirdError as error:
            fault = f"BIRD ({self._control_socket}) {error}"
        else:
            self.fault = None
            return True
        if fault != self.fault:
            log.error("%s", fault)
        self.fault = fault
        return False


def write(path: Path, text: str) -> None:
    """Put the text there whole, if it is not there already."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)
