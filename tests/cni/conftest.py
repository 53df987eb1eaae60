"""A node as the daemon sees it: a namespace with a plain bridge, and namespaces that stand for pods."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from cni import netns
from cni.result import VERSIONS
from cni.service import CniService, NodeNetwork
from cni.store import FILE_NAME
from forwarder.control.messages import Response, decode_request, encode_response

REPOSITORY = Path(__file__).resolve().parents[2]
MTU = 1450
NETWORK = NodeNetwork(
    bridge="loom0",
    mtu=MTU,
    prefixes=(ip_network("10.71.0.0/24"), ip_network("fd71::/64")),
    gateways=(ip_address("10.71.0.1"), ip_address("fd71::1")),
    cluster_cidrs=(ip_network("10.71.0.0/16"), ip_network("fd71::/48")),
    gso_max_segs=44,
)

_serial = itertools.count()


def sh(*command: str) -> str:
    """The command's stdout; its stderr is in the failure."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Answer:
    """One call's outcome; `body` is None when nothing was printed."""

    exit: int
    body: Any

    @classmethod
    def of(cls, exit_code: int, stdout: str) -> Answer:
        return cls(exit_code, json.loads(stdout) if stdout else None)


@dataclass
class Namespaces:
    """Makes namespaces with names of this run only."""

    made: list[str] = field(default_factory=list)

    def new(self) -> str:
        name = f"plcni-{os.getpid()}-{next(_serial)}"
        sh("ip", "netns", "add", name)
        self.made.append(name)
        return name

    def remove_all(self) -> None:
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Node:
    """A CniService that lives in a namespace of its own, called as a runtime calls."""

    def __init__(self, name: str, state_dir: Path) -> None:
        self.name = name
        self.state_dir = state_dir
        self.service = CniService(NETWORK, state_dir)
        self.control_socket = state_dir.parent / "control.sock"
        self._netns = os.open(f"/run/netns/{name}", os.O_RDONLY)

    def close(self) -> None:
        self.service.close()
        os.close(self._netns)

    def handle(self, env: Mapping[str, str], stdin: str, began_at: float | None = None) -> tuple[int, str]:
        return netns.call_in(self._netns, self.service.handle, env, stdin, began_at)

    def conf(self, version: str = "1.0.0", **keys: Any) -> dict[str, Any]:
        return {
            "cniVersion": version,
            "name": "podnet",
            "type": "podloom-cni",
            "controlSocket": str(self.control_socket),
            "stateDir": str(self.state_dir),
        } | keys

    def call(self, command: str, pod: str, conf: Mapping[str, Any] | None = None, **env: str) -> Answer:
        """A call for the pod whose namespace and container id are `pod`."""
        return Answer.of(*self.handle(environment(command, pod, **env), json.dumps(conf or self.conf())))

    def settle(self) -> None:
        """Wait until the control socket has no call under way: one goes on when its plugin is gone. Calls
        take turns there, so this one comes last."""
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.control_socket))
            last.shutdown(socket.SHUT_WR)
            assert last.recv(1) == b""

    def links(self) -> dict[str, dict[str, Any]]:
        return links_of(self.name)

    def held(self) -> list[str]:
        """The addresses that are given out, with their attachment's container."""
        with sqlite3.connect(self.state_dir / FILE_NAME) as database:
            rows = database.execute(
                "SELECT address, container FROM addresses WHERE rests_until IS NULL ORDER BY 1"
            ).fetchall()
        database.close()
        return [f"{ip_address(address)} {container}" for address, container in rows]

    def records(self) -> list[tuple[str, str, str]]:
        database = sqlite3.connect(self.state_dir / FILE_NAME)
        try:
            return database.execute("SELECT network, container, ifname FROM attachments").fetchall()
        finally:
            database.close()

    def traces(self, *pods: str) -> dict[str, object]:
        """Everything an ADD could leave behind, once the kernel has freed what was deleted."""
        for thread in threading.enumerate():
            if thread.name == "delete-link":
                thread.join()
        return {
            "links": sorted(self.links()),
            "pods": {pod: sorted(links_of(pod)) for pod in pods},
            "held": self.held(),
            "records": self.records(),
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        }


def environment(command: str, pod: str, **others: str) -> dict[str, str]:
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod,
        "CNI_NETNS": f"/run/netns/{pod}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
    } | others


def links_of(namespace: str) -> dict[str, dict[str, Any]]:
    """`ip -d -j link` by name."""
    return {link["ifname"]: link for link in json.loads(sh("ip", "-n", namespace, "-d", "-j", "link"))}


def run_plugin(
    env: Mapping[str, str], stdin: bytes, in_namespace: str | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The real process, with nothing in its environment but `env` and what Python needs."""
    enter = ["ip", "netns", "exec", in_namespace] if in_namespace else []
    return subprocess.run(
        [*enter, sys.executable, "-m", "cni"],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **env},
    )


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")
    made = Namespaces()
    try:
        yield made
    finally:
        made.remove_all()


@pytest.fixture
def node(namespaces: Namespaces, tmp_path: Path) -> Iterator[Node]:
    """A node with its bridge, gateways on it, ready to serve."""
    name = namespaces.new()
    sh("ip", "-n", name, "link", "set", "lo", "up")
    sh("ip", "-n", name, "link", "add", "loom0", "type", "bridge")
    sh("ip", "-n", name, "addr", "add", "10.71.0.1/24", "dev", "loom0")
    sh("ip", "-n", name, "addr", "add", "fd71::1/64", "dev", "loom0", "nodad")
    sh("ip", "-n", name, "link", "set", "loom0", "up")
    made = Node(name, tmp_path / "state")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def control_socket(node: Node) -> Iterator[Path]:
    """The daemon's end of the control socket, answering the verb `cni` only."""
    with ControlServer(node.control_socket, node.handle):
        yield node.control_socket


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class ControlServer:
    """A line of JSON each way, one connection after the other."""

    def __init__(
        self,
        path: Path,
        handle: Callable[[Mapping[str, str], str, float], tuple[int, str]],
    ) -> None:
        self._handle = handle
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._path = path
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ControlServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._socket.close()
        self._path.unlink()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                line = lines.readline()
                if not line.endswith(b"\n"):
                    continue  # the plugin was killed while it asked
                request = decode_request(line)
                assert request.verb == "cni"
                exit_code, stdout = self._handle(
                    request.args["env"], request.args["stdin"], request.args["began_at"]
                )
                with suppress(ConnectionError):  # or while it waited
                    connection.sendall(encode_response(Response({"exit": exit_code, "stdout": stdout})))
