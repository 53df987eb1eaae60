"""A real etcd of one member, with a data directory and ports of its own."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import until

STOP_SECONDS = 20.0


class EtcdServer:
    """Started when made; `close` ends it, however it was treated. `host` is where clients find it."""

    def __init__(self, directory: Path, *, host: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        """`within` are the words that run a command in a namespace."""
        if shutil.which("etcd") is None:
            pytest.skip("no etcd (Debian package etcd-server): what needs one is NOT tested in this run")
        self._host, self._within = host, within
        self._ports = free_ports(2)
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._ports[0]}"

    def start(self, *words: str) -> None:
        """Returns when it answers."""
        peers = f"http://127.0.0.1:{self._ports[1]}"
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._within,
                    "etcd",
                    *("--name", "one", "--data-dir", str(self._directory / "data")),
                    *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                    *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
                    *("--initial-cluster", f"one={peers}", "--unsafe-no-fsync"),
                    *words,
                ],
                stdout=log,
                stderr=log,
            )
        until(lambda: self.try_ctl("endpoint", "health").returncode == 0, "etcd's answer", 20.0)

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            process.wait(STOP_SECONDS)

    def freeze(self) -> None:
        """It keeps its connections and says nothing, as behind a cable that was cut."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    close = stop

    def ctl(self, *words: str) -> str:
        done = self.try_ctl(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*self._within, "etcdctl", "--endpoints", self.url, *words]
        return subprocess.run(
            command,
            env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


async def eventually(condition: Any, what: str, seconds: float = 10.0) -> None:
    """Return when the condition holds; AssertionError when the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.02)
