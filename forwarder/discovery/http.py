"""What the sources that speak HTTP share: sockets that notice a dead server, TLS, and lines of a stream."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from forwarder.faults import ConfigError, Fault

CONNECT_SECONDS: Final = 3.0
REQUEST_SECONDS: Final = 5.0
LIST_SECONDS: Final = 60.0
"""Ten thousand records over a slow line."""

DEAD_SECONDS: Final = 20
"""A server whose host went away without a word is noticed so soon, on connections that wait too."""

MAX_BYTES: Final = 1 << 26
"""Longest answer, and longest line of a stream: what 100,000 records need."""

SMALL_BYTES: Final = 1 << 16
"""Longer JSON is read in a thread: packets wait while the event loop reads it."""


def deadlines(seconds: float | None, silence_seconds: float | None = None) -> aiohttp.ClientTimeout:
    """For a request as a whole, and between two pieces of its answer."""
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds)


class HttpError(RuntimeError):
    """The server could not be asked or did not do what it was asked; the text says why."""


def open_session(
    tls: ssl.SSLContext | None = None, headers: dict[str, str] | None = None
) -> aiohttp.ClientSession:
    """A session for a few servers, in whose environment no proxy is looked for. The caller closes it."""
    connector = aiohttp.TCPConnector(ssl=tls or True, socket_factory=_open_socket, limit=8)
    return aiohttp.ClientSession(
        connector=connector, timeout=deadlines(REQUEST_SECONDS), headers=headers, trust_env=False
    )


def _open_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_SECONDS // 2)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, DEAD_SECONDS // 8))
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)
    opened.setblocking(False)
    return opened


def tls_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """Verifies the server by `ca_file`, or else by the host's authorities. ConfigError if a file cannot
    be used."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(str(path) for path in (ca_file, cert_file, key_file) if path is not None)
        raise ConfigError(
            [Fault("discovery", named, f"must be certificates and a key in PEM: {error}")]
        ) from None
    return context


@contextmanager
def sensible(refuse: type[Exception], url: str) -> Iterator[None]:
    """What an answer lacks, or has of a wrong kind, is raised as `refuse`: something else answers there."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(f"{url}: an answer that makes no sense: {error!r}") from None


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body. HttpError if it is longer than MAX_BYTES."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HttpError(f"an answer of more than {MAX_BYTES} bytes")
    return bytes(body)


async def read_lines(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a stream of lines, each when it is complete."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        rest += chunk
        if len(rest) > MAX_BYTES:
            raise HttpError(f"a line of more than {MAX_BYTES} bytes")
        if b"\n" not in chunk:
            continue
        *lines, tail = bytes(rest).split(b"\n")
        rest = bytearray(tail)
        for line in lines:
            if line.strip():
                yield await decode(line)


async def decode(body: bytes) -> dict[str, Any]:
    """A JSON object. HttpError if it is none."""
    try:
        value = json.loads(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise HttpError(f"an answer that is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HttpError("an answer that is not a JSON object")
    return value
