"""Nodes for tests: a namespace on a wire, a configuration, and a real `podloom up` in it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.netns_tools import Namespace

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 20.0


def until(condition: Any, what: str, seconds: float = 10.0) -> Any:
    """The condition's first true value; AssertionError when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return value


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML of one-level tables: strings, numbers, booleans and lists of them are written as JSON does."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


@dataclass
class Node:
    """Node `number` of a cluster, 192.0.2.NUMBER on the wire, with its files in `directory`."""

    number: int
    namespace: Namespace
    directory: Path
    process: subprocess.Popen[str] | None = None
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.tables = {
            "cluster": {"cidrs": ["10.42.0.0/16", "fd42::/48"]},
            "node": {
                "id": f"n{self.number}",
                "endpoints": [f"192.0.2.{self.number}"],
                "prefixes": [f"10.42.{self.number}.0/24", f"fd42:0:0:{self.number}::/64"],
                "state_dir": str(self.directory / "state"),
                "run_dir": str(self.directory / "run"),
            },
            "discovery": {"file": str(self.peers_file)},
        }
        self.write_peers("")

    @property
    def config_file(self) -> Path:
        return self.directory / "podloom.toml"

    @property
    def peers_file(self) -> Path:
        return self.directory / "peers.toml"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def text(self) -> str:
        """The configuration file's text."""
        return toml(self.tables)

    def record(self, **more: Any) -> str:
        """Our [[peer]] table in others' files."""
        table = {
            "id": f"n{self.number}",
            "endpoints": self.tables["node"]["endpoints"],
            "prefixes": self.tables["node"]["prefixes"],
        }
        return toml({"[peer]": table | more})

    def write_config(self) -> None:
        self.config_file.write_text(self.text())

    def write_peers(self, text: str) -> None:
        self.peers_file.with_suffix(".new").write_text(text)
        self.peers_file.with_suffix(".new").replace(self.peers_file)

    def start(self) -> None:
        """Write the configuration, start the daemon, and return when it says READY to its supervisor."""
        self.write_config()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            address = self.directory / "notify"
            address.unlink(missing_ok=True)
            notified.bind(str(address))
            self.process = self.popen("up", NOTIFY_SOCKET=str(address))
            ended = os.pidfd_open(self.process.pid)
            try:
                ready, _, _ = select.select([notified.fileno(), ended], [], [], START_SECONDS)
                assert notified.fileno() in ready, f"the daemon did not get ready: {self.log}"
                assert notified.recv(100) == b"READY=1"
            finally:
                os.close(ended)

    def popen(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        with (self.directory / "log").open("a") as log:
            return subprocess.Popen(
                self.namespace.command(
                    [sys.executable, "-m", "forwarder", *words, "-c", str(self.config_file)]
                ),
                stderr=log,
                stdout=log,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, **environment},
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon by a signal; its exit status."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(STOP_SECONDS)

    def clean_up(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)

    @property
    def control_socket(self) -> Path:
        return self.directory / "run" / "control.sock"

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`podloom WORDS -c OUR FILE` in the namespace."""
        return self.python("-m", "forwarder", *words, "-c", str(self.config_file))

    def python(self, *words: str, under: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`python WORDS` in the namespace, by way of the command `under` if there is one."""
        return subprocess.run(
            self.namespace.command([*under, sys.executable, *words]),
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
            cwd=REPOSITORY,
        )

    def ask(self, verb: str) -> Any:
        """What the daemon says, whatever the configuration file has become."""
        done = self.python("-m", "forwarder", verb, "--json", "--socket", str(self.control_socket))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
