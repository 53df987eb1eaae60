"""The resolver as the daemon sees it: its sockets, its process, and what it is to know.

The sockets are the daemon's, so that a resolver that dies loses no more than the queries it held.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from ipaddress import ip_address
from typing import Any, Final

from forwarder.addresses import Address
from forwarder.names.records import Change, Key, Put, Record, Remove, Replace, to_json
from forwarder.names.servers import DNS_PORT
from forwarder.names.settings import MAX_LINE_BYTES, Settings

START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 2.0
ASK_SECONDS: Final = 8.0
LINE_RECORDS: Final = 50
WATCH_SECONDS: Final = 10.0
"""How often the resolver is asked whether it still answers."""

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
SOUND_SECONDS: Final = 60.0
"""A resolver that lived this long is started again at once when it dies."""

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_FREEBIND = {4: (socket.IPPROTO_IP, 15), 6: (socket.IPPROTO_IPV6, 78)}  # IP_FREEBIND, linux/in.h; in6.h

log = logging.getLogger("podloom.names")


class NamesError(RuntimeError):
    """The resolver cannot be started or does not answer; the text says why and what to do."""


class NameService:
    """`apply` what sources say, before and after `start` on the running loop; `close` it.

    What is known when it starts is known to its first answer."""

    def __init__(self, settings: Settings, port: int = DNS_PORT) -> None:
        """`port` 0 takes any: `port` says which."""
        self.port = port
        self._settings = settings
        self._sockets: list[socket.socket] = []
        self._sources: dict[str, dict[Key, Record]] = {}
        self._outbox: asyncio.Queue[Iterable[bytes]] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._connected = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        """Open the sockets and start the process. NamesError if the addresses are taken."""
        try:
            udp, tcp = [], []
            for address in map(ip_address, self._settings.addresses):
                udp.append(self._open(address, socket.SOCK_DGRAM))
                tcp.append(self._open(address, socket.SOCK_STREAM))
        except BaseException:
            self._close_sockets()
            raise
        self._settings = replace(self._settings, udp=tuple(udp), tcp=tuple(tcp))
        self._keeper = asyncio.create_task(self._keep())
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._connected.wait()
        except TimeoutError:
            await self.close()
            raise NamesError("the resolver's process did not start; the log says why") from None

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._close_sockets()

    def apply(self, source: str, change: Change) -> None:
        """Tell the resolver what a source of names says; it is kept for a resolver that has to start anew."""
        known = self._sources.setdefault(source, {})
        match change:
            case Replace(records):
                known.clear()
                known.update((record.key, record) for record in records)
            case Put(records):
                known.update((record.key, record) for record in records)
            case Remove(keys):
                for key in keys:
                    known.pop(key, None)
        if not known and source not in self._settings.expected:
            del self._sources[source]  # Sources come and go with nodes.
        if self._outbox is not None:
            self._outbox.put_nowait(lines_of(source, change))

    async def ask(self, name: str | None = None) -> dict[str, Any]:
        """What the resolver would answer for a name or address, or all it has. NamesError if it does not."""
        async with self._asking:
            if self._outbox is None or self._reader is None:
                raise NamesError("the resolver is being started again: ask in a few seconds, and see the log")
            try:
                self._outbox.put_nowait((_line({"name": name}),))
                async with asyncio.timeout(ASK_SECONDS):
                    line = await self._reader.readline()
                answer: dict[str, Any] = json.loads(line)["answer"]
            except (OSError, ValueError):
                # One that is stuck does not see its connection close, and a late answer would be taken for
                # the next question's.
                if self._process is not None and self._process.returncode is None:
                    self._process.kill()
                raise NamesError("the resolver did not answer; it is started again") from None
            return answer

    def _open(self, address: Address, kind: socket.SocketKind) -> int:
        opened = socket.socket(_FAMILY[address.version], kind)
        self._sockets.append(opened)
        try:
            if kind == socket.SOCK_STREAM:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The address may still be under duplicate address detection.
            opened.setsockopt(*_FREEBIND[address.version], 1)
            if address.version == 6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind((str(address), self.port))
            self.port = opened.getsockname()[1]
            if kind == socket.SOCK_STREAM:
                opened.listen(64)
        except OSError as error:
            what = "UDP" if kind == socket.SOCK_DGRAM else "TCP"
            raise NamesError(
                f"cannot answer names on {address} {what} port {self.port}: {error.strerror}; is another "
                "resolver listening on all of this host's addresses? Bind it to its own, or set "
                "names.enabled = false"
            ) from error
        opened.setblocking(False)
        return opened.fileno()

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    async def _keep(self) -> None:
        """Run the process; when it dies, run another, at growing intervals if it dies young."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            started_at = time.monotonic()
            try:
                ending = f"ended with status {await self._run_once()}"
            except OSError as error:
                ending = f"could not be started: {error}"
            if time.monotonic() - started_at > SOUND_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.error("the resolver %s: started again in %g s", ending, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _run_once(self) -> int:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "forwarder.names", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *self._settings.udp, *self._settings.tcp),
                    # A terminal's Ctrl-C is for the daemon, which then closes our end.
                    start_new_session=True,
                )
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        except BaseException:
            ours.close()
            raise
        outbox: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        outbox.put_nowait((_line(asdict(self._settings)),))
        for source, known in self._sources.items():
            outbox.put_nowait(lines_of(source, Replace(tuple(known.values()))))
        outbox.put_nowait((_line({"serve": True}),))
        sender = asyncio.create_task(_send(writer, outbox))
        try:
            self._process, self._reader, self._outbox = process, reader, outbox
            self._connected.set()
            return await self._watch(process)
        finally:
            self._process = self._reader = self._outbox = None
            sender.cancel()
            writer.close()
            await _end(process)

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        """The status it ends with; one that is stuck is ended."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    return await process.wait()
            with suppress(NamesError):
                await self.ask("localhost")


def lines_of(source: str, change: Change) -> Iterator[bytes]:
    """The change as lines, each of few records: encoding one takes no longer than packets may wait."""
    if isinstance(change, Remove):
        yield _line({"source": source, **to_json(change)})
        return
    records = change.records
    for start in range(0, len(records), LINE_RECORDS):
        part = to_json(Put(records[start : start + LINE_RECORDS]))["put"]
        yield _line({"source": source, "part": part})
    yield _line({"source": source, "replace" if isinstance(change, Replace) else "put": []})


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + b"\n"


async def _send(writer: asyncio.StreamWriter, outbox: asyncio.Queue[Iterable[bytes]]) -> None:
    with suppress(ConnectionError):  # It died, and `_watch` knows.
        while True:
            for line in await outbox.get():
                writer.write(line)
                await writer.drain()
                await asyncio.sleep(0)  # Packets first.


async def _end(process: asyncio.subprocess.Process) -> None:
    """See a process out whose connection was closed."""
    if process.returncode is None:
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
