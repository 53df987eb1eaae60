from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

import pytest

from forwarder import bgp, bird
from forwarder.bgp import Speaker
from forwarder.bird import BirdError, Reply, ReplyReader, configure, include

PREFIXES = (ip_network("10.42.1.0/24"), ip_network("fd42:0:0:1::/64"))
DONE = "0002-Reading configuration from /etc/bird/bird.conf\n0003 Reconfigured\n"
WELCOME = "0001 BIRD 2.0.12 ready.\n"


def test_the_include_file() -> None:
    assert include(PREFIXES, "loom0") == (
        "# Kept by podloom: what is changed here is lost.\n"
        "protocol static podloom4 {\n"
        "  ipv4;\n"
        '  route 10.42.1.0/24 via "loom0";\n'
        "}\n"
        "protocol static podloom6 {\n"
        "  ipv6;\n"
        '  route fd42:0:0:1::/64 via "loom0";\n'
        "}\n"
    )
    assert "route" not in include((), "loom0")
    assert include((), "loom0").count("protocol static") == 2


@pytest.mark.parametrize(
    ("lines", "reply"),
    [
        (["0003 Reconfigured"], Reply(3, "Reconfigured")),
        (["0002-Reading", "0003 Reconfigured"], Reply(3, "Reading; Reconfigured")),
        (["1002-one", " two", "0000 "], Reply(0, "one; two")),
        (["+ log", "0013 Daemon is up"], Reply(13, "Daemon is up")),
        (["8002 bird.conf:3:1 syntax error"], Reply(8002, "bird.conf:3:1 syntax error")),
    ],
)
def test_replies(lines: list[str], reply: Reply) -> None:
    reader = ReplyReader()
    assert [reader.feed(line) for line in lines] == [*[None] * (len(lines) - 1), reply]


@pytest.mark.parametrize(
    "line", ["", "HTTP/1.1 400 Bad Request", "003 short", " goes on with nothing", "0003x"]
)
def test_what_is_not_birds(line: str) -> None:
    with pytest.raises(BirdError, match="not BIRD's control protocol"):
        ReplyReader().feed(line)


async def serve(path: Path, welcome: str, answer: str, then: Callable[[], object]) -> tuple[object, str]:
    """What `then` gives while somebody on the socket says this; and what was said to him."""
    heard: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(welcome.encode())
        heard.append((await reader.readline()).decode())
        writer.write(answer.encode())
        with suppress(OSError):
            await writer.drain()
        writer.close()
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_unix_server(talk, path)
    async with server:
        done = then()
        assert asyncio.iscoroutine(done)
        try:
            return await done, "".join(heard)
        finally:
            await ended.wait()


def test_bird_is_told_to_configure(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    told = asyncio.run(serve(path, WELCOME, DONE, lambda: configure(path)))
    assert told == ("Reading configuration from /etc/bird/bird.conf; Reconfigured", "configure\n")


@pytest.mark.parametrize(
    ("welcome", "answer", "why"),
    [
        (WELCOME, "0002-Reading\n8002 podloom.conf:3:1 syntax error\n", "refuses: .*3:1 syntax error"),
        (WELCOME, "0006 Reconfiguration ignored, shutting down\n", "refuses: .*shutting down"),
        (WELCOME, "0016 Access restricted\n", "refuses"),
        (WELCOME, "0002-Reading\n", "closed the connection"),
        ("220 mail.example ESMTP\n", "", "not BIRD's control protocol"),
        (WELCOME, "x" * (2 * bird.MAX_LINE_BYTES), "without an end"),
    ],
)
def test_what_bird_answers_else(tmp_path: Path, welcome: str, answer: str, why: str) -> None:
    path = tmp_path / "ctl"
    with pytest.raises(BirdError, match=why):
        asyncio.run(serve(path, welcome, answer, lambda: configure(path)))


def test_a_bird_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bird, "REPLY_SECONDS", 0.05)

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "ctl"))
        silent.listen()
        with pytest.raises(BirdError, match="did not answer"):
            asyncio.run(configure(tmp_path / "ctl"))


def test_it_is_tried_until_bird_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bgp, "FIRST_PAUSE_SECONDS", 0.01)
    path = tmp_path / "ctl"
    speaker = Speaker(tmp_path / "podloom.conf", path, "loom0")

    async def announce() -> None:
        task = asyncio.create_task(speaker.announce(PREFIXES))
        await asyncio.sleep(0.05)
        assert speaker.fault == f"BIRD ({path}) cannot be reached: No such file or directory"
        await serve(path, WELCOME, DONE, lambda: asyncio.wait_for(task, 5))

    asyncio.run(announce())
    assert speaker.fault is None
    assert (tmp_path / "podloom.conf").read_text() == include(PREFIXES, "loom0")
    assert [path.name for path in tmp_path.glob("*.new")] == []


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    speaker = Speaker(tmp_path / "no" / "podloom.conf", tmp_path / "ctl", "loom0")
    asyncio.run(speaker.withdraw())
    assert (
        speaker.fault
        == f"bgp.include cannot be written: {tmp_path}/no/podloom.conf: No such file or directory"
    )


def test_what_is_there_already_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "podloom.conf"
    bgp.write(path, "a")
    before = path.stat().st_ino
    bgp.write(path, "a")
    assert path.stat().st_ino == before
    bgp.write(path, "b")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("b", 0o644)
