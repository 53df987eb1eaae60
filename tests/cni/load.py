"""Two CNI plugins under the same load: ours with a real daemon, and Debian's bridge with host-local."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cni import install
from tests.cni.runtime import DEBIAN_PLUGINS, installed_plugin
from tests.netns.nodes import Node as DaemonNode
from tests.netns_tools import Namespace, make_netns, remove_netns


@dataclass
class Timed:
    """A plugin called for pods of one node; `seconds` by command, one figure a call."""

    name: str
    path: Path
    namespace: str
    conf: dict[str, Any]
    cni_path: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ADD": [], "DEL": [], "STATUS": []})

    def call(self, command: str, pod: str) -> Any:
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_NETNS": f"/run/netns/{pod}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": self.cni_path,
            "PATH": os.environ["PATH"],
        }
        started = time.perf_counter()
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.namespace}", self.path],
            input=json.dumps(self.conf).encode(),
            capture_output=True,
            env=env,
            check=False,
        )
        self.seconds[command].append(time.perf_counter() - started)
        assert done.returncode == 0, (self.name, command, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout else None

    def percentile(self, command: str, percent: int) -> float:
        """In milliseconds."""
        figures = sorted(self.seconds[command])
        return 1000 * figures[min(len(figures) * percent // 100, len(figures) - 1)]

    def line(self) -> str:
        parts = (
            f"{command} p50 {self.percentile(command, 50):6.1f} p99 {self.percentile(command, 99):6.1f} ms"
            for command, figures in self.seconds.items()
            if figures
        )
        return f"{self.name:22}" + "   ".join(parts)


@contextmanager
def both(directory: Path, pods: int) -> Iterator[tuple[DaemonNode, Timed, Timed, list[str]]]:
    """(our node with its daemon, our plugin, theirs on a node of its own, pod namespaces)."""
    with ExitStack() as undo:

        def new() -> Namespace:
            namespace = make_netns()
            undo.callback(remove_netns, namespace)
            return namespace

        node = DaemonNode(1, new(), directory / "n1")
        undo.callback(node.clean_up)
        node.namespace.ip("link", "add", "eth0", "type", "veth", "peer", "name", "wire")
        for end in ("eth0", "wire"):
            node.namespace.ip("link", "set", end, "up")
        node.namespace.ip("addr", "add", "192.0.2.1/24", "dev", "eth0")
        node.tables["cluster"]["cidrs"] = ["10.42.0.0/16"]
        node.tables["node"]["prefixes"] = ["10.42.16.0/20"]
        node.start()
        undo.callback(node.stop)
        plugins = installed_plugin(directory)
        ours = Timed(
            "podloom",
            plugins / install.PLUGIN,
            node.namespace.name,
            {
                "cniVersion": "1.1.0",
                "name": "podnet",
                "type": install.PLUGIN,
                "controlSocket": str(node.control_socket),
                "stateDir": str(directory / "n1" / "state"),
            },
            str(plugins),
        )
        theirs = Timed(
            "bridge + host-local",
            DEBIAN_PLUGINS / "bridge",
            new().name,
            {
                "cniVersion": "1.0.0",
                "name": "podnet",
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "isDefaultGateway": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.43.16.0/20"}]],
                    "dataDir": str(directory / "host-local"),
                },
            },
            str(DEBIAN_PLUGINS),
        )
        yield node, ours, theirs, [new().name for _ in range(pods)]


def storm(plugin: Timed, pods: list[str], after_adds: Callable[[list[Any]], None]) -> None:
    """ADD for all pods at once, then DEL for all of them at once."""
    with ThreadPoolExecutor(len(pods)) as threads:
        after_adds(list(threads.map(lambda pod: plugin.call("ADD", pod), pods)))
        list(threads.map(lambda pod: plugin.call("DEL", pod), pods))
