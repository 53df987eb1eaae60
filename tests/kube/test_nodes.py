"""Nodes that find each other by a real API server, with no list of peers and the least rights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kube.conftest import CLUSTER_CIDR, Cluster, KubeNode, until
from tests.netns.nodes import REPOSITORY, toml

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

RIGHTS: list[dict[str, Any]] = [
    {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "podloom", "namespace": "kube-system"},
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "podloom"},
        "rules": [
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
        ],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "podloom"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "podloom"},
        "subjects": [{"kind": "ServiceAccount", "name": "podloom", "namespace": "kube-system"}],
    },
]


@pytest.fixture(scope="module")
def kubeconfig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a service account that has the rights above and no others."""
    cluster.kubectl(
        "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": RIGHTS})
    )

    def token() -> str:
        secrets = cluster.get("secrets", "-n", "kube-system")["items"]
        mine = [one for one in secrets if one["metadata"]["name"].startswith("podloom-token-")]
        return b64decode(mine[0]["data"]["token"]).decode() if mine else ""

    view = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json"))
    view["users"][0]["user"] = {"token": until(token, "the service account's token", 30)}
    path = tmp_path_factory.mktemp("kubeconfig") / "config"
    path.write_text(json.dumps(view))
    return path


@pytest.fixture
def nodes(cluster: Cluster, kubeconfig: Path) -> Iterator[list[KubeNode]]:
    """Both nodes' daemons stopped and set up to have everything from the API server; afterwards as before."""
    before = {node.name: (node.directory / "podloom.toml").read_text() for node in cluster.nodes}
    try:
        for node in cluster.nodes:
            node.stop()
            tables: dict[str, dict[str, Any]] = {
                "cluster": {"cidrs": [CLUSTER_CIDR]},
                "node": {
                    "endpoints": [node.endpoint],
                    "state_dir": str(node.directory / "state"),
                    "run_dir": str(node.directory / "run"),
                },
                "discovery": {
                    "source": "kubernetes",
                    "kubeconfig": str(kubeconfig),
                    "node_name": node.name,
                },
            }
            tables["node"]["id"] = node.name  # the links of the daemon before carry its id
            (node.directory / "podloom.toml").write_text(toml(tables))
        yield list(cluster.nodes)
    finally:
        for node in cluster.nodes:
            node.stop()
            (node.directory / "podloom.toml").write_text(before[node.name])
            launch(node)


def launch(node: KubeNode) -> float:
    """Start the daemon; when it answered."""
    socket = node.directory / "run" / "control.sock"
    with (node.directory / "log").open("a") as log:
        node.process = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/kl-n{node.number}", sys.executable),
                *("-m", "forwarder", "up", "-c", str(node.directory / "podloom.toml")),
            ],
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
        )
    until(lambda: ask(node, "status", check=False), f"{node.name}: {log.name}", 30)
    assert socket.exists()
    return time.monotonic()


def ask(node: KubeNode, verb: str, *, check: bool = True) -> Any:
    socket = str(node.directory / "run" / "control.sock")
    done = subprocess.run(
        [sys.executable, "-m", "forwarder", verb, "--json", "--socket", socket],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert not check or done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else None


def pod(name: str, node: KubeNode) -> dict[str, Any]:
    container = {
        "name": "c",
        "image": "docker.io/local/busybox:1",
        "imagePullPolicy": "Never",
        "command": ["/bin/sleep", "3600"],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node.name,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [container],
        },
    }


def test_a_node_that_comes_later_is_reached_within_five_seconds(
    cluster: Cluster, nodes: list[KubeNode]
) -> None:
    one, two = nodes
    launch(one)
    assert ask(one, "status")["prefixes"] == [one.pod_cidr()]
    assert ask(one, "status")["discovery"]["fault"] is None
    answered_at = launch(two)
    until(lambda: [peer["id"] for peer in ask(one, "peers")] == [two.name], "the second node", 5)
    assert time.monotonic() - answered_at < 5
    annotations = cluster.get("node", two.name)["metadata"]["annotations"]
    assert annotations["podloom.dev/endpoints"] == two.endpoint
    (peer,) = ask(one, "peers")
    assert peer["router_mac"] == annotations["podloom.dev/router-mac"] == ask(two, "status")["router_mac"]
    assert peer["prefixes"] == [two.pod_cidr()]
    for node in nodes:
        assert ask(node, "status")["discovery"]["unannounced"] is None

    items = [pod("seen-a", one), pod("seen-b", two)]
    cluster.kubectl(
        "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    )
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "pod/seen-a", "pod/seen-b", "--timeout=60s")
        address = cluster.get("pod", "seen-b")["status"]["podIP"]
        said = cluster.kubectl("exec", "seen-a", "--", "/bin/ping", "-c", "3", "-W", "5", address)
        assert "3 packets received" in said
    finally:
        cluster.kubectl("delete", "pod", "seen-a", "seen-b", "--wait=true", "--timeout=60s")

    # A Node that loses its annotations is no peer until its daemon has put them there again.
    cluster.kubectl("annotate", "node", two.name, "podloom.dev/endpoints-")
    until(
        lambda: "podloom.dev/endpoints" in cluster.get("node", two.name)["metadata"]["annotations"],
        "the annotation's return",
        10,
    )
    until(lambda: [peer["id"] for peer in ask(one, "peers")] == [two.name], "the second node", 5)


def test_a_reload_changes_from_a_file_to_the_api_server(cluster: Cluster, nodes: list[KubeNode]) -> None:
    one, two = nodes
    for node in nodes:
        launch(node)
    until(lambda: ask(one, "peers"), "the second node", 5)
    text = (one.directory / "podloom.toml").read_text()
    static = text.replace('source = "kubernetes"', 'source = "static"')
    (one.directory / "podloom.toml").write_text(static)
    assert one.process is not None
    one.process.send_signal(signal.SIGHUP)
    until(lambda: "node.prefixes" in (one.directory / "log").read_text(), "the refusal", 10)
    assert [peer["id"] for peer in ask(one, "peers")] == [two.name]
