"""A real Kubernetes, where there is one: PODLOOM_KUBELAB names a program that makes clusters for tests.

It takes the words `up NODES`, `down`, `kubectl ...` and `nodedir N`; node N is the network namespace kl-nN
with its own containerd, kubelet and kube-proxy. KUBELAB_DIR is where it may keep its state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import REPOSITORY, toml

NODES = 2
CLUSTER_CIDR = "10.244.0.0/16"


@dataclass
class KubeNode:
    """Node `number`, with our daemon and plugin on it."""

    number: int
    cluster: Cluster
    directory: Path
    prefix: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def endpoint(self) -> str:
        return f"192.168.76.{10 + self.number}"

    def command(self, *words: str) -> str:
        """Its output, in the node's network namespace but the machine's mounts, as containerd runs."""
        return run("nsenter", f"--net=/run/netns/kl-n{self.number}", *words)

    def podloom(self, *words: str) -> str:
        return self.command(sys.executable, "-m", "forwarder", *words)

    def start(self, peers: Sequence[KubeNode]) -> None:
        self.directory.mkdir()
        peers_file = self.directory / "peers.toml"
        peers_file.write_text(
            "".join(
                toml({"[peer]": {"id": peer.name, "endpoints": [peer.endpoint], "prefixes": [peer.prefix]}})
                for peer in peers
            )
        )
        node = {
            "id": self.name,
            "endpoints": [self.endpoint],
            "prefixes": [self.prefix],
            "state_dir": str(self.directory / "state"),
            "run_dir": str(self.directory / "run"),
        }
        tables: dict[str, dict[str, Any]] = {
            "cluster": {"cidrs": [CLUSTER_CIDR]},
            "node": node,
            "discovery": {"file": str(peers_file)},
        }
        config = self.directory / "podloom.toml"
        config.write_text(toml(tables))
        with (self.directory / "log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/kl-n{self.number}", sys.executable),
                    *("-m", "forwarder", "up", "-c", str(config)),
                ],
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
            )
        socket = self.directory / "run" / "control.sock"
        until(socket.exists, f"{self.name}'s daemon: {(self.directory / 'log').read_text()}", 30)
        cni = Path(self.cluster.lab("nodedir", str(self.number)).strip()) / "cni"
        self.podloom(
            *("cni", "install", "--bin-dir", str(cni / "bin"), "--conf-dir", str(cni / "net.d")),
            *("--socket", str(socket), "--state-dir", str(self.directory / "state")),
        )

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    def pod_cidr(self) -> str:
        return str(self.cluster.get("node", self.name)["spec"].get("podCIDR", ""))

    def is_empty(self) -> bool:
        return not self.pods() and not self.ports()

    def pods(self) -> list[dict[str, Any]]:
        words = ("pods", "--json", "--state-dir", str(self.directory / "state"))
        return list(json.loads(self.podloom(*words)))

    def ports(self) -> list[str]:
        links = json.loads(self.command("ip", "-j", "link"))
        return [link["ifname"] for link in links if link["ifname"].startswith("pl")]


@dataclass
class Cluster:
    """The lab, and our part in it."""

    program: str
    directory: Path
    all_nodes: Sequence[KubeNode] = ()
    nodes: Sequence[KubeNode] = ()
    """Those that have a podloom."""

    @property
    def spare(self) -> KubeNode:
        """A node without one, and so not Ready."""
        return self.all_nodes[-1]

    def lab(self, *words: str, given: str = "") -> str:
        return run(self.program, *words, given=given, env={"KUBELAB_DIR": str(self.directory)})

    def kubectl(self, *words: str, given: str = "") -> str:
        return self.lab("kubectl", *words, given=given)

    def get(self, *words: str) -> Any:
        return json.loads(self.kubectl("get", *words, "-o", "json"))


def run(*words: str, given: str = "", env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def until(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """The condition's first true value; AssertionError when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.3)
    return value


@pytest.fixture(scope="session")
def cluster(tun: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that are each other's peers, Ready, and a spare one."""
    program = os.environ.get("PODLOOM_KUBELAB", "")
    if not program:
        pytest.skip("PODLOOM_KUBELAB is not set: podloom under a real kubelet is NOT tested in this run")
    directory = tmp_path_factory.mktemp("kube")
    cluster = Cluster(program, directory / "lab")
    cluster.directory.mkdir()
    with ExitStack() as undo:
        # As systemd has a host's root: what containerd mounts is seen in the mount namespaces of containers.
        run("mount", "--bind", str(cluster.directory), str(cluster.directory))
        undo.callback(run, "umount", str(cluster.directory))
        run("mount", "--make-shared", str(cluster.directory))
        undo.callback(cluster.lab, "down")
        cluster.lab("up", str(NODES + 1))
        cluster.all_nodes = [KubeNode(n, cluster, directory / f"n{n}") for n in range(1, NODES + 2)]
        cluster.nodes = cluster.all_nodes[:NODES]
        for node in cluster.nodes:
            node.prefix = until(node.pod_cidr, "podCIDR", 60)
        for node in cluster.nodes:
            undo.callback(node.stop)
            node.start([peer for peer in cluster.nodes if peer is not node])
        yield cluster
