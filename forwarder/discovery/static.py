"""Peers from the configuration and from a TOML file, which is read again when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, NamedTuple

from forwarder.addresses import Network
from forwarder.config import Config, DiscoveryConfig, parse_peers, read_text
from forwarder.discovery import Snapshot, Trouble
from forwarder.faults import ConfigError
from forwarder.peers import PeerRecord, check

POLL_SECONDS: Final = 0.5


class Signature(NamedTuple):
    """What tells one content of a file from the next without reading it."""

    inode: int
    size: int
    modified_ns: int


class StaticSource:
    """The [[peer]] tables of the configuration and of discovery.file together."""

    def __init__(self, config: Config, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._config = config
        self._path = config.discovery.file
        self._poll_seconds = poll_seconds
        self._relocated = False

    async def own_prefixes(self) -> tuple[Network, ...]:
        return self._config.node.prefixes

    async def watch(self) -> AsyncIterator[Snapshot | Trouble]:
        seen = signature(self._path)
        yield await self._read(seen)
        while True:
            await asyncio.sleep(self._poll_seconds)
            current = signature(self._path)
            if current == seen and not self._relocated:
                continue
            self._relocated = False
            # A file replaced by rename is whole. One written in place may still be growing, and half of
            # it would be valid TOML with half of the peers: wait until it rests for one interval.
            while (
                seen is not None and current is not None and current != seen and current.inode == seen.inode
            ):
                await asyncio.sleep(self._poll_seconds)
                previous, current = current, signature(self._path)
                if current == previous:
                    break
            seen = current
            yield await self._read(seen)

    def relocate(self, config: Config) -> None:
        """Nobody is told by a file; what it says is checked again."""
        self._config = config
        self._relocated = True

    async def close(self) -> None:
        """Nothing stays open."""

    async def _read(self, found: Signature | None) -> Snapshot | Trouble:
        # In a thread: ten thousand peers are a second of parsing.
        return await asyncio.to_thread(read, self._config, found is not None)


def read(config: Config, file_exists: bool) -> Snapshot | Trouble:
    """The peers of the configuration and its file, or every fault in them."""
    path = config.discovery.file
    if not file_exists and path == DiscoveryConfig().file:
        return Snapshot(main_file_peers(config))  # Nobody asked for the default file.
    try:
        from_file = parse_peers(read_text(path), config)
    except ConfigError as error:
        return Trouble(tuple(f"{path}: {fault}" for fault in error.faults))
    peers = (*from_file, *config.peers)
    keys = [f"peer[{index}]" for index in range(len(from_file))]
    keys += main_file_peers(config)
    # All or nothing: a file is one person's word, and half of it is not what was meant.
    faults = check(peers, config.local, keys)
    if faults:
        return Trouble(tuple(f"{path}: {fault}" for fault in faults))
    return Snapshot(dict(zip(keys, peers, strict=True)))


def main_file_peers(config: Config) -> dict[str, PeerRecord]:
    """The [[peer]] tables of the configuration itself, by what faults call them."""
    return {f"the main file's peer[{index}]": peer for index, peer in enumerate(config.peers)}


def signature(path: Path) -> Signature | None:
    """None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns)
