"""Network namespaces for tests: made with names of this run only, looked at with iproute2 (an opinion that
is not our own), and removed whatever happens."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_serial = itertools.count(1)


@dataclass(frozen=True)
class Namespace:
    """A network namespace with lo up. Processes in it see its /proc/sys/net."""

    name: str

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def ip(self, *words: str) -> str:
        """The output of `ip WORDS` here."""
        return run(["ip", "-n", self.name, *words])

    def ip_json(self, *words: str) -> Any:
        """What `ip -d -j WORDS` says here."""
        return json.loads(run(["ip", "-n", self.name, "-d", "-j", *words]) or "[]")

    def bridge_json(self, *words: str) -> Any:
        return json.loads(run(["bridge", "-n", self.name, "-d", "-j", *words]) or "[]")

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs WORDS here. `ip` replaces itself, so the pid is that of the command."""
        return ["ip", "netns", "exec", self.name, *words]

    def sysctl(self, name: str) -> str:
        return run(self.command(["cat", "/proc/sys/" + name])).strip()

    def set_sysctl(self, name: str, value: str) -> None:
        run(self.command(["tee", "/proc/sys/" + name]), input=value)

    def link_names(self) -> set[str]:
        return {link["ifname"] for link in self.ip_json("link")}


def make_netns() -> Namespace:
    """A new namespace; the caller removes it."""
    namespace = Namespace(f"pltest-{os.getpid()}-{next(_serial)}")
    run(["ip", "netns", "add", namespace.name])
    namespace.ip("link", "set", "lo", "up")
    return namespace


def remove_netns(namespace: Namespace) -> None:
    subprocess.run(["ip", "netns", "del", namespace.name], check=False, capture_output=True)


def join(one: Namespace, other: Namespace, *, mtu: int = 1500) -> None:
    """A veth pair, `eth0` in both, up, without addresses."""
    here = ["eth0", "netns", one.name, "mtu", str(mtu)]
    there = ["eth0", "netns", other.name, "mtu", str(mtu)]
    run(["ip", "link", "add", *here, "type", "veth", "peer", "name", *there])
    for namespace in (one, other):
        namespace.ip("link", "set", "eth0", "up")


def run(command: Sequence[str], **options: Any) -> str:
    """The command's stdout; a failure shows its stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, **options)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return str(done.stdout)
