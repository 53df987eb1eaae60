"""A real etcd on loopback, with data directories and ports of its own."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import until

STOP_SECONDS = 20.0


class EtcdServer:
    """Started when told to; `close` ends it, however it was treated."""

    def __init__(self, directory: Path, *, name: str = "one", tls: Path | None = None) -> None:
        """`tls` is a directory with ca.crt, it.crt and it.key, for server and clients alike."""
        if shutil.which("etcd") is None:
            pytest.skip("no etcd (Debian package etcd-server): what needs one is NOT tested in this run")
        self._ports = free_ports(3)
        self._hidden = False
        self._name, self._directory, self._tls = name, directory, tls
        self._members: tuple[EtcdServer, ...] = (self,)
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(exist_ok=True)

    @classmethod
    def cluster(cls, directory: Path, count: int) -> tuple[EtcdServer, ...]:
        """Members of one cluster, to be launched all before any is ready."""
        members = tuple(cls(directory / f"m{number}", name=f"m{number}") for number in range(count))
        for member in members:
            member._members = members
        return members

    @property
    def url(self) -> str:
        """Where clients look for it."""
        return self._url(self._ports[0])

    def _url(self, port: int) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{port}"

    @property
    def _client_url(self) -> str:
        return self._url(self._ports[2]) if self._hidden else self.url

    @property
    def _peer_url(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self, *, hidden: bool = False) -> None:
        """Returns when it answers; only `ctl`, if it is hidden."""
        self._hidden = hidden
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        words = ["--name", self._name, "--data-dir", str(self._directory / "data"), "--unsafe-no-fsync"]
        words += ["--listen-client-urls", self._client_url, "--advertise-client-urls", self._client_url]
        words += ["--listen-peer-urls", self._peer_url, "--initial-advertise-peer-urls", self._peer_url]
        everyone = ",".join(f"{member._name}={member._peer_url}" for member in self._members)
        words += ["--initial-cluster", everyone]
        if self._tls is not None:
            words += ["--client-cert-auth", "--trusted-ca-file", str(self._tls / "ca.crt")]
            words += ["--cert-file", str(self._tls / "it.crt"), "--key-file", str(self._tls / "it.key")]
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(["etcd", *words], stdout=log, stderr=log)

    def wait_ready(self) -> None:
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
        command = ["etcdctl", "--endpoints", self._client_url]
        if self._tls is not None:
            command += ["--cacert", str(self._tls / "ca.crt")]
            command += ["--cert", str(self._tls / "it.crt"), "--key", str(self._tls / "it.key")]
        return subprocess.run(
            [*command, *words],
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
