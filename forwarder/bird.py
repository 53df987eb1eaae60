"""BIRD 2: what it is told of this node, and how it is told to read that. Pure but for `configure`.

The control socket speaks lines that begin with a four-digit code: then a space for the last line of a reply,
or a dash for another. A line that begins with a space goes on with the code before; one that begins with a
plus belongs to no reply. Codes from 8000 on are errors (BIRD's doc/reply_codes).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forwarder.addresses import Network

REPLY_SECONDS: Final = 10.0
MAX_LINE_BYTES: Final = 1 << 16
WELCOME: Final = 1
RECONFIGURED: Final = {3, 4, 5}
"""Done, in progress, and queued behind one that is."""

FIRST_ERROR: Final = 8000

_LINE = re.compile(r"(\d{4})([ -])(.*)")


class BirdError(RuntimeError):
    """BIRD cannot be told; the text says why."""


def include(prefixes: Iterable[Network], bridge: str) -> str:
    """The file that bird.conf includes. A route by the bridge is there while the bridge is; the IPv4 and IPv6
    ones have protocols of their own even if empty, so that what names them in bird.conf can stay."""
    lines = ["# Kept by podloom: what is changed here is lost."]
    prefixes = list(prefixes)
    for version in (4, 6):
        lines += [f"protocol static podloom{version} {{", f"  ipv{version};"]
        lines += [f'  route {prefix} via "{bridge}";' for prefix in prefixes if prefix.version == version]
        lines.append("}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """`code` is the last line's; `text` holds all lines."""

    code: int
    text: str


class ReplyReader:
    """Puts lines together to replies."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def feed(self, line: str) -> Reply | None:
        """The reply that this line is the last of. BirdError if it is no line of the protocol."""
        if line.startswith("+"):
            return None
        if line.startswith(" ") and self._lines:
            self._lines.append(line[1:])
            return None
        match = _LINE.fullmatch(line)
        if match is None:
            raise BirdError(f"says {line[:80]!r}, which is not BIRD's control protocol")
        code, last, text = int(match[1]), match[2] == " ", match[3]
        self._lines.append(text)
        if not last:
            return None
        lines, self._lines = self._lines, []
        return Reply(code, "; ".join(filter(None, lines)))


async def configure(control_socket: Path) -> str:
    """Have BIRD read its configuration again; what it says. BirdError if it does not, and then it goes on
    with the one that it has."""
    try:
        async with asyncio.timeout(REPLY_SECONDS):
            reader, writer = await asyncio.open_unix_connection(control_socket, limit=MAX_LINE_BYTES)
            try:
                await _reply(reader, {WELCOME})
                writer.write(b"configure\n")
                await writer.drain()
                return await _reply(reader, RECONFIGURED)
            finally:
                writer.close()
    except TimeoutError:
        raise BirdError(f"did not answer within {REPLY_SECONDS:.0f} s") from None
    except OSError as error:
        raise BirdError(f"cannot be reached: {error.strerror or error}") from None


async def _reply(reader: asyncio.StreamReader, expected: set[int]) -> str:
    replies = ReplyReader()
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            raise BirdError("sends a line without an end") from None
        if not line:
            raise BirdError("closed the connection")
        reply = replies.feed(line.decode(errors="replace").rstrip("\n"))
        if reply is None:
            continue
        if reply.code not in expected:
            raise BirdError(f"refuses: {reply.text}")
        return reply.text
