"""The control socket: accepts local administrators, decodes a line, asks the daemon, encodes the answer."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from forwarder.control.messages import (
    MAX_LINE_BYTES,
    MessageError,
    Request,
    Response,
    decode_request,
    encode_response,
)

GRACE_SECONDS: Final = 10.0
"""How long closing waits for requests under way: a CNI ADD cut in half would leave a pod half wired."""

_UCRED = struct.Struct("3i")  # struct ucred of linux/socket.h: pid, uid, gid

log = logging.getLogger("podloom.control")


class VerbError(Exception):
    """A request that cannot be fulfilled; the text is the answer's error."""


class ControlServer:
    """Serves one unix socket, 0600 in a directory the caller keeps 0700."""

    def __init__(self, path: Path, answer: Callable[[Request], Awaitable[Any]]) -> None:
        """`answer` gives a request's result (any JSON value) or raises VerbError."""
        self._path = path
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._waiting: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. A socket left by a killed daemon is replaced: the caller holds the directory's lock."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_LINE_BYTES)
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """Stop listening, let what is under way finish, and leave no socket behind."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._path.unlink(missing_ok=True)
        for task in self._waiting:
            task.cancel()
        if self._busy:
            _, unfinished = await asyncio.wait(self._busy, timeout=GRACE_SECONDS)
            for task in unfinished:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (start_unix_server runs this as a task)
        try:
            if not _is_administrator(writer.get_extra_info("socket")):
                writer.write(encode_response(Response(error="only root may talk to podloom")))
                return
            while self._server is not None:
                self._waiting.add(task)
                try:
                    line = await reader.readline()
                except ValueError:
                    error = f"a line is longer than {MAX_LINE_BYTES} bytes"
                    writer.write(encode_response(Response(error=error)))
                    return
                finally:
                    self._waiting.discard(task)
                if not line:
                    return
                self._busy.add(task)
                try:
                    writer.write(await self._respond(line))
                    await writer.drain()
                finally:
                    self._busy.discard(task)
        except (ConnectionError, asyncio.CancelledError):
            return  # The client went away, or the daemon does.
        finally:
            writer.close()

    async def _respond(self, line: bytes) -> bytes:
        try:
            return encode_response(Response(result=await self._answer(decode_request(line))))
        except (MessageError, VerbError) as error:
            return encode_response(Response(error=str(error)))
        except Exception:
            log.exception("a control request failed")
            return encode_response(Response(error="internal error: the daemon's log has the details"))


def _is_administrator(connection: Any) -> bool:
    """Root, or the user the daemon itself runs as; by the kernel's word, not the client's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return uid in (0, os.geteuid())
