from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from forwarder.control.client import ControlError, ask
from forwarder.control.messages import MAX_LINE_BYTES, Request
from forwarder.control.server import ControlServer, VerbError

DEADLINE_SECONDS = 10.0


async def answer(request: Request) -> Any:
    """A daemon of three verbs."""
    match request.verb:
        case "echo":
            return request.args
        case "refuse":
            raise VerbError("not today")
    raise RuntimeError("a bug")


def serve(
    path: Path,
    story: Callable[[ControlServer], Awaitable[None]],
    verbs: Callable[[Request], Awaitable[Any]] = answer,
) -> None:
    """Run a story while a server listens on the path; the loop is the product's."""

    async def told() -> None:
        server = ControlServer(path, verbs)
        await server.open()
        try:
            await asyncio.wait_for(story(server), DEADLINE_SECONDS)
        finally:
            await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(told())


async def exchange(path: Path, sent: bytes) -> list[Any]:
    """Every line that comes back until the server closes; we close our sending side after `sent`."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 24)
    try:
        writer.write(sent)
        if writer.can_write_eof():
            writer.write_eof()
        return [json.loads(line) for line in (await reader.read()).splitlines()]
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b'{"verb": "echo", "args": {"a": 1}}\n', [{"result": {"a": 1}}]),
        (b'{"verb": "echo"}\n{"verb": "refuse"}\n', [{"result": {}}, {"error": "not today"}]),
        (b"nonsense\n", [{"error": "not JSON: Expecting value: line 1 column 1 (char 0)"}]),
        (b'nonsense\n{"verb": "echo"}\n', [..., {"result": {}}]),
        (b'{"verb": "crash"}\n', [{"error": "internal error: the daemon's log has the details"}]),
        (b"", []),
        (b'{"verb": "echo"}', [{"result": {}}]),
        (b"x" * (MAX_LINE_BYTES + 2), [{"error": f"a line is longer than {MAX_LINE_BYTES} bytes"}]),
    ],
    ids=["one", "two", "not JSON", "goes on after an error", "bug", "nothing", "no newline", "too long"],
)
def test_what_is_answered(tmp_path: Path, sent: bytes, answers: list[Any]) -> None:
    path = tmp_path / "control.sock"

    async def story(_: ControlServer) -> None:
        got = await exchange(path, sent)
        assert len(got) == len(answers)
        assert all(expected in (..., one) for one, expected in zip(got, answers, strict=True))

    serve(path, story)


def test_the_socket_is_ours_alone_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def story(_: ControlServer) -> None:
        assert path.stat().st_mode & 0o777 == 0o600

    serve(path, story)
    assert not path.exists()


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def story(_: ControlServer) -> None:
        assert await exchange(path, b'{"verb": "echo"}\n') == [{"result": {}}]

    serve(path, story)


@pytest.mark.root
def test_another_user_is_refused_by_the_kernels_word(root: None, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    program = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.chdir(sys.argv[1]); os.setuid(65534); "
        "s.connect('control.sock'); print(s.recv(1000).decode())"
    )

    def stranger() -> str:
        tmp_path.chmod(0o755)  # as if the modes had been lost
        path.chmod(0o666)
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    async def story(_: ControlServer) -> None:
        said = await asyncio.to_thread(stranger)
        assert json.loads(said) == {"error": "only root may talk to podloom"}

    serve(path, story)


def test_closing_lets_what_is_under_way_finish(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(_: Request) -> str:
        begun.set()
        await may_end.wait()
        return "done"

    async def story(server: ControlServer) -> None:
        idle_reader, idle_writer = await asyncio.open_unix_connection(str(path))
        asked = asyncio.create_task(exchange(path, b'{"verb": "slow"}\n'))
        await begun.wait()
        closing = asyncio.create_task(server.close())
        assert await idle_reader.read() == b"", "who waits for nothing is let go at once"
        idle_writer.close()
        assert not closing.done()
        with pytest.raises(FileNotFoundError):
            await asyncio.open_unix_connection(str(path))
        may_end.set()
        assert await asked == [{"result": "done"}]
        await closing

    serve(path, story, slow)


def test_the_client_asks_and_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def story(_: ControlServer) -> None:
        assert await asyncio.to_thread(ask, path, "echo") == {}
        with pytest.raises(ControlError, match=r"^not today$"):
            await asyncio.to_thread(ask, path, "refuse")

    serve(path, story)


def test_the_client_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="start it with `podloom up`"):
        ask(tmp_path / "absent.sock", "echo")
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        with pytest.raises(ControlError, match="start it with `podloom up`"):
            ask(path, "echo")
        left.listen()
        with pytest.raises(ControlError, match=r"did not answer on .* within 0\.05 s"):
            ask(path, "echo", timeout_seconds=0.05)
    with pytest.raises(ControlError, match="no usable answer"):
        ask(tmp_path / ("x" * 200), "echo")


def test_a_server_that_drips_does_not_outlast_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "drip.sock"
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while not stop.wait(0.01):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        dripper = threading.Thread(target=drip, args=(listener,))
        dripper.start()
        try:
            with pytest.raises(ControlError, match="did not answer"):
                ask(path, "echo", timeout_seconds=0.2)
        finally:
            stop.set()
            dripper.join()
