"""deploy/ on the nodes of a real cluster: its objects, rights, configuration and entry point as they stand.

There is no image, so up.sh runs in what a container of the DaemonSet would see: a root directory of its own
with the manifest's mounts, the node's network namespace, and a service account's token.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kube.conftest import Cluster, KubeNode, until
from tests.kube.test_kubelet import is_ready
from tests.kube.test_nodes import ask, launch
from tests.netns.nodes import REPOSITORY
from tests.unit.test_deploy import DEPLOY, containers, documents, only

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

CLUSTER_DNS = "10.96.0.10"
"""What the lab's kubelets tell their pods."""

API_SERVICE = "10.96.0.1"
NAMES = f"""
[names]
enabled = true
addresses = ["{CLUSTER_DNS}"]
"""

CONTAINER = """
root=$1
mount -t tmpfs none "$root"
for part in bin sbin lib lib64 usr opt root home tmp dev proc sys; do
    if [ -d "/$part" ]; then
        mkdir "$root/$part"
        mount --rbind "/$part" "$root/$part"
    fi
done
mkdir -p "$root/run/netns" "$root/run/podloom" "$root/var/lib/podloom" "$root/config"
mkdir -p "$root/run/secrets/kubernetes.io"
ln -s /run "$root/var/run"
cp -a /etc "$root/etc"
mount --rbind /run/netns "$root/run/netns"
mount --bind "$2/run" "$root/run/podloom"
mount --bind "$2/state" "$root/var/lib/podloom"
cp -a "$2/config/." "$root/config"
cp -a "$2/account" "$root/run/secrets/kubernetes.io/serviceaccount"
cp -a "$3"/*.sh "$root"
exec chroot "$root" "$4"
"""


class Deployed:
    """The manifest in a cluster, and its container on some of the nodes."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self._directory = directory
        self._account = directory / "account"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def apply(self) -> None:
        """All of the manifest is valid for a real API server, and all but the DaemonSet is put there."""
        described = documents()
        env = described[-1]["spec"]["template"]["spec"]["containers"][0]["env"]
        (host_ips,) = (one for one in env if one["name"] == "HOST_IPS")
        # As the manifest's comment says for Kubernetes before 1.30.
        host_ips["valueFrom"]["fieldRef"]["fieldPath"] = "status.hostIP"
        namespace, *rest = described
        self.cluster.kubectl("apply", "-f", "-", given=json.dumps(namespace))
        everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": rest})
        self.cluster.kubectl("apply", "--dry-run=server", "-f", "-", given=everything)
        put = json.dumps({"apiVersion": "v1", "kind": "List", "items": rest[:-1]})
        self.cluster.kubectl("apply", "-f", "-", given=put)
        self._account.mkdir()
        (self._account / "token").write_text(until(self._token, "the service account's token", 30))
        shutil.copy(self.cluster.directory / "pki" / "api" / "apiserver.crt", self._account / "ca.crt")

    def _token(self) -> str:
        secrets = self.cluster.get("secrets", "-n", "podloom")["items"]
        mine = [one for one in secrets if one["metadata"]["name"].startswith("podloom-token-")]
        return b64decode(mine[0]["data"]["token"]).decode() if mine else ""

    def remove(self) -> None:
        for node in self.cluster.all_nodes:
            self.stop(node)
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents()[:-1]})
        self.cluster.kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "-", given=given)

    def start(self, node: KubeNode) -> None:
        """The DaemonSet's container on a node; returns when it answers."""
        (command,) = containers()["podloom"]["command"]
        root, mounts = self._directory / f"root-{node.name}", self._directory / node.name
        root.mkdir()
        for name in ("run", "state", "config"):
            (mounts / name).mkdir(parents=True)
        shutil.copytree(self._account, mounts / "account")
        config = only("ConfigMap")["data"]["podloom.toml"] + NAMES
        (mounts / "config" / "podloom.toml").write_text(config)
        node.directory = mounts
        environment = {
            "PATH": f"{REPOSITORY}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NODE_NAME": node.name,
            "HOST_IPS": node.endpoint,
            "KUBERNETES_SERVICE_HOST": API_SERVICE,
            "KUBERNETES_SERVICE_PORT": "443",
        }
        with (mounts / "log").open("w") as log:
            self._processes[node.name] = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/kl-n{node.number}"),
                    *("unshare", "--mount", "--propagation", "slave", "sh", "-euc", CONTAINER, "sh"),
                    *(str(root), str(mounts), str(DEPLOY), command),
                ],
                stdout=log,
                stderr=log,
                env=environment,
            )
        until(lambda: ask(node, "status", check=False), f"{node.name}: {log.name}", 60)
        self.install(node)

    def install(self, node: KubeNode) -> None:
        """What install.sh ends with. A lab's nodes share a file system, so each says where its files are."""
        cni = Path(self.cluster.lab("nodedir", str(node.number)).strip()) / "cni"
        node.podloom(
            *("cni", "install", "--bin-dir", str(cni / "bin"), "--conf-dir", str(cni / "net.d")),
            *("--socket", str(node.directory / "run" / "control.sock")),
            *("--state-dir", str(node.directory / "state")),
        )

    def stop(self, node: KubeNode) -> None:
        process = self._processes.pop(node.name, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def forget_links(node: KubeNode) -> None:
    """They carry the id of the podloom that made them."""
    for link in ("loom0", "loom-tap"):
        words = ["ip", "-n", f"kl-n{node.number}", "link", "del", link]
        subprocess.run(words, capture_output=True, check=False)


@pytest.fixture(scope="module")
def deployed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """On the two nodes that have a podloom of the other tests, which comes back at the end."""
    deployed = Deployed(cluster, tmp_path_factory.mktemp("deployed"))
    before = {node.name: node.directory for node in cluster.nodes}
    with ExitStack() as undo:
        for node in cluster.nodes:
            node.stop()
            forget_links(node)
            undo.callback(bring_back, node, before[node.name], deployed)
        undo.callback(deployed.remove)
        deployed.apply()
        for node in cluster.nodes:
            deployed.start(node)
        yield deployed


def bring_back(node: KubeNode, directory: Path, deployed: Deployed) -> None:
    node.directory = directory
    forget_links(node)
    launch(node)
    deployed.install(node)


SERVE = "mkdir -p /tmp/www && hostname >/tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"


def container(*command: str) -> dict[str, Any]:
    return {
        "name": "c",
        "image": "docker.io/local/busybox:1",
        "imagePullPolicy": "Never",
        "command": list(command),
    }


def client(name: str, node: KubeNode) -> dict[str, Any]:
    spec = {
        "nodeName": node.name,
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "containers": [container("/bin/sleep", "3600")],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


WEB: list[dict[str, Any]] = [
    {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "shop"}},
            "template": {
                "metadata": {"labels": {"app": "shop"}},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "automountServiceAccountToken": False,
                    "containers": [container("/bin/sh", "-c", SERVE)],
                },
            },
        },
    },
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "shop"},
        "spec": {"selector": {"app": "shop"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    },
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "shop-pods"},
        "spec": {
            "clusterIP": "None",
            "selector": {"app": "shop"},
            "ports": [{"name": "http", "port": 8080}],
        },
    },
]


def put(cluster: Cluster, *items: dict[str, Any]) -> None:
    cluster.kubectl(
        "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    )


def in_pod(cluster: Cluster, pod: str, script: str) -> str:
    """What it prints, faults too; never fails."""
    return cluster.kubectl("exec", pod, "--", "/bin/sh", "-c", f"{script} 2>&1; true").strip()


def shop(cluster: Cluster) -> dict[str, Any]:
    """The Deployment's one pod that is Ready."""
    pods = cluster.get("pods", "-l", "app=shop")["items"]
    ready = [pod for pod in pods if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]
    return ready[0] if len(ready) == 1 else {}


def test_nodes_are_peers_and_services_have_names_wherever_their_pods_go(deployed: Deployed) -> None:
    cluster = deployed.cluster
    one, two = cluster.nodes
    until(lambda: [peer["id"] for peer in ask(one, "peers")] == [two.name], "the second node", 10)
    assert ask(one, "status")["discovery"]["unannounced"] is None
    conditions = {item["type"]: item for item in cluster.get("node", one.name)["status"]["conditions"]}
    assert conditions.get("NetworkUnavailable", {"status": "False"})["status"] == "False"
    put(cluster, client("asker", one), *WEB)
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "pod/asker", "--timeout=90s")
        first = until(lambda: shop(cluster), "the shop", 90)
        assert f"nameserver {CLUSTER_DNS}" in in_pod(cluster, "asker", "cat /etc/resolv.conf")
        fetch = "timeout 10 wget -qO- http://shop/"
        until(
            lambda: in_pod(cluster, "asker", fetch) == first["metadata"]["name"], "the shop by its name", 15
        )
        lookup = in_pod(cluster, "asker", "nslookup shop-pods.default.svc.cluster.local")
        assert first["status"]["podIP"] in lookup
        assert API_SERVICE in in_pod(cluster, "asker", "nslookup kubernetes.default.svc.cluster.local")
        assert "NXDOMAIN" in in_pod(cluster, "asker", "nslookup absent.default.svc.cluster.local")

        cluster.kubectl("cordon", first["spec"]["nodeName"])
        cluster.kubectl("delete", "pod", first["metadata"]["name"])
        second = until(lambda: shop(cluster), "the shop on another node", 90)
        ready_at = time.monotonic()
        assert second["spec"]["nodeName"] != first["spec"]["nodeName"]
        until(lambda: in_pod(cluster, "asker", fetch) == second["metadata"]["name"], "the moved shop", 15)
        until(
            lambda: (
                second["status"]["podIP"]
                in in_pod(cluster, "asker", "nslookup shop-pods.default.svc.cluster.local")
            ),
            "its new address",
            15,
        )
        print(f"by its Service's names {time.monotonic() - ready_at:.1f} s after it was Ready")  # noqa: T201
    finally:
        for node in (one, two):
            cluster.kubectl("uncordon", node.name)
        cluster.kubectl("delete", "deployment/shop", "service/shop", "service/shop-pods", "pod/asker")


def test_a_node_added_later_is_reached_within_five_seconds_of_ready(deployed: Deployed) -> None:
    """It has no podloom and is not Ready until now; nobody is told of it but by its Node."""
    cluster = deployed.cluster
    one, late = cluster.nodes[0], cluster.spare
    assert not is_ready(cluster.get("node", late.name))
    gateway = str(late.pod_cidr()).replace(".0/24", ".1")
    put(cluster, client("watcher", one))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/watcher", "--timeout=90s")
    ping = f"ping -c 1 -W 1 {gateway}"
    assert "100% packet loss" in in_pod(cluster, "watcher", ping)
    deployed.start(late)
    try:
        until(lambda: is_ready(cluster.get("node", late.name)), "the node Ready", 60)
        ready_at = time.monotonic()
        until(lambda: ", 0% packet loss" in in_pod(cluster, "watcher", ping), "the node", 5)
        print(f"reached {time.monotonic() - ready_at:.1f} s after it was Ready")  # noqa: T201
        put(cluster, client("newcomer", late))
        cluster.kubectl("wait", "--for=condition=Ready", "pod/newcomer", "--timeout=90s")
        address = cluster.get("pod", "newcomer")["status"]["podIP"]
        assert ", 0% packet loss" in in_pod(cluster, "watcher", f"ping -c 3 -W 5 {address}")
        back = cluster.get("pod", "watcher")["status"]["podIP"]
        assert ", 0% packet loss" in in_pod(cluster, "newcomer", f"ping -c 3 -W 5 {back}")
        assert API_SERVICE in in_pod(cluster, "newcomer", "nslookup kubernetes.default.svc.cluster.local")
    finally:
        cluster.kubectl("delete", "pod", "watcher", "newcomer", "--ignore-not-found")
        deployed.stop(late)
        cluster.kubectl("annotate", "node", late.name, "podloom.dev/endpoints-")


def test_the_manifests_rights_are_enough_and_no_more(deployed: Deployed) -> None:
    """With a stolen token nobody can make pods, read secrets or change a Node's spec."""
    account = "--as=system:serviceaccount:podloom:podloom"

    def may(*words: str) -> bool:
        program = deployed.cluster.program
        env = {**os.environ, "KUBELAB_DIR": str(deployed.cluster.directory)}
        done = subprocess.run(
            [program, "kubectl", "auth", "can-i", account, *words],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() == "yes"

    assert may("watch", "nodes")
    assert may("patch", "nodes", "--subresource=status")
    assert may("watch", "endpointslices.discovery.k8s.io")
    for words in (
        ("patch", "nodes"),
        ("delete", "nodes"),
        ("get", "secrets", "-A"),
        ("create", "pods", "-A"),
        ("list", "pods", "-A"),
        ("get", "configmaps", "-n", "podloom"),
    ):
        assert not may(*words), words
