"""kill -9 at every system call of ADD and of DEL: what is left is put right by a retry and one GC.

And every system call to the disk or the kernel's networking failing once: an error, and nothing left.
"""

from __future__ import annotations

import errno
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni import install
from tests.cni.conftest import REPOSITORY, Answer, Namespaces, Node, environment, links_of

pytestmark = pytest.mark.root

EVERY = pytest.mark.parametrize(
    "stride", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


class Stepper:
    """The helper process, in the node's namespace."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", node.name, sys.executable, "-m", "tests.cni.stepper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()

    def run(self, how: str, command: str, pod: str, at: int, errno: int = 0) -> tuple[int, int | None]:
        """(system calls that it got to, its exit code or None if it was killed)."""
        call = {
            "how": how,
            "env": environment(command, pod),
            "stdin": json.dumps(self._node.conf("1.1.0")),
            "state_dir": str(self._node.state_dir),
            "at": at,
            "errno": errno,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["points"], answer["exit"]


@pytest.fixture
def stepper(node: Node) -> Iterator[Stepper]:
    made = Stepper(node)
    try:
        yield made
    finally:
        made.close()


class Scene:
    """One pod that stays, to see that it is left alone, and one that is worked upon."""

    def __init__(self, node: Node, namespaces: Namespaces) -> None:
        self.node = node
        self.bystander, self.pod = namespaces.new(), namespaces.new()
        self.kept = self.call("ADD", self.bystander).body
        node.call("DEL", self.pod)
        self.before = self.state()

    def call(self, command: str, pod: str, **keys: Any) -> Answer:
        return self.node.call(command, pod, self.node.conf("1.1.0", **keys))

    def state(self) -> dict[str, object]:
        state = self.node.traces(self.bystander, self.pod)
        del state["descriptors"]
        return state

    def collect(self, *valid: str) -> None:
        listed = [{"containerID": pod, "ifname": "eth0"} for pod in (self.bystander, *valid)]
        conf = self.node.conf("1.1.0") | {"cni.dev/valid-attachments": listed}
        env = {"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}
        assert self.node.handle(env, json.dumps(conf)) == (0, "")

    def assert_complete(self, added: Answer | None = None) -> None:
        """CHECK finds all as it was promised; without an answer, as it is recorded."""
        leases = [address.split()[0] for address in self.node.held() if address.endswith(f" {self.pod}")]
        body = (
            added.body if added else {"ips": [{"address": f"{a}/{128 if ':' in a else 32}"} for a in leases]}
        )
        assert self.call("CHECK", self.pod, prevResult=body).exit == 0

    def assert_attached(self) -> None:
        """The pod can be attached; both have addresses of their own, and nothing is there twice."""
        added = self.call("ADD", self.pod)
        assert added.exit == 0, added
        self.assert_complete(added)
        assert self.call("CHECK", self.bystander, prevResult=self.kept).exit == 0
        self.collect(self.pod)
        given = [ip["address"].split("/")[0] for body in (added.body, self.kept) for ip in body["ips"]]
        assert sorted(line.split()[0] for line in self.node.held()) == sorted(given)
        assert len(set(given)) == 4
        assert len(self.node.records()) == 2
        assert len([name for name in self.node.links() if name.startswith("pl")]) == 2
        assert set(links_of(self.pod)) == {"lo", "eth0"}


@pytest.mark.timeout(900)
@EVERY
@pytest.mark.parametrize("how", ["service", "plugin"])
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_killed_at_every_system_call(
    node: Node,
    namespaces: Namespaces,
    stepper: Stepper,
    control_socket: Path,
    record_property: Any,
    command: str,
    how: str,
    stride: int,
) -> None:
    """Turn about: DEL and ADD again, as runtimes do, then one GC; or nothing but one GC."""
    scene = Scene(node, namespaces)
    for tested in itertools.count():
        at = 1 + tested * stride
        if command == "DEL":
            assert scene.call("ADD", scene.pod).exit == 0
        points, exit_code = stepper.run(how, command, scene.pod, at)
        node.settle()
        if exit_code is not None:
            assert (exit_code, at > points) == (0, True)
            break
        if tested % 2:
            assert scene.call("DEL", scene.pod).exit == 0
            scene.assert_attached()
            assert scene.call("DEL", scene.pod).exit == 0
        scene.collect()
        assert scene.state() == scene.before, f"killed at system call {at}"
    record_property("killed", f"at {tested} of {points} system calls: nothing lost, nothing leaked")
    assert points > (50 if how == "service" else 3)


FAULTS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.ENOBUFS)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="faults are put into x86-64 registers")
@pytest.mark.timeout(900)
@EVERY
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_every_system_call_failing_once(
    node: Node, namespaces: Namespaces, stepper: Stepper, record_property: Any, command: str, stride: int
) -> None:
    """What fails is undone by the call itself, without a retry or a GC; what succeeds is whole."""
    scene, refused = Scene(node, namespaces), 0
    for tested in itertools.count():
        at = 1 + tested * stride
        if command == "DEL":
            assert scene.call("ADD", scene.pod).exit == 0
        points, exit_code = stepper.run("service", command, scene.pod, at, FAULTS[tested % len(FAULTS)])
        if at > points:
            assert exit_code == 0
            break
        refused += exit_code != 0
        if command == "ADD" and exit_code == 0:
            scene.assert_complete()
        if command == "DEL" or exit_code == 0:
            assert scene.call("DEL", scene.pod).exit == 0
        assert scene.state() == scene.before, f"failed at system call {at}"
    record_property("failed", f"{tested} of {points} system calls, {refused} were told: nothing left")
    assert refused > tested // 2


@pytest.mark.timeout(300)
def test_an_install_killed_at_every_system_call(node: Node, stepper: Stepper) -> None:
    """There is never half a file, nor a configuration without its plugin; and uninstall takes it all away."""
    bin_dir, conf_dir = (node.state_dir / name for name in ("bin", "conf"))
    plugin, conflist = bin_dir / install.PLUGIN, conf_dir / install.CONFLIST
    node.state_dir.mkdir()
    whole = install.launcher()
    for at in itertools.count(1):
        points, exit_code = stepper.run("install", "ADD", "none", at)
        if exit_code is not None:
            break
        assert not plugin.exists() or plugin.read_text() == whole
        assert not conflist.exists() or (plugin.exists() and json.loads(conflist.read_text()))
        install.uninstall(bin_dir, conf_dir)
        assert [path for path in node.state_dir.rglob("*") if not path.is_dir()] == []
    assert (at > points > 20, exit_code, conflist.exists()) == (True, 0, True)
