"""kubelet, containerd and kube-proxy as our callers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.kube.conftest import Cluster, KubeNode, until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

PODS = 20
PORT, HOST_PORT = 8080, 18080
SERVE = f"mkdir -p /tmp/www && hostname >/tmp/www/index.html && exec httpd -f -p {PORT} -h /tmp/www"


def manifest(number: int, node: KubeNode) -> dict[str, Any]:
    port: dict[str, Any] = {"containerPort": PORT}
    if number == 0:
        port["hostPort"] = HOST_PORT
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"web-{number}", "labels": {"app": "web"}},
        "spec": {
            "nodeName": node.name,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "web",
                    "image": "docker.io/local/busybox:1",
                    "imagePullPolicy": "Never",
                    "command": ["/bin/sh", "-c", SERVE],
                    "ports": [port],
                }
            ],
        },
    }


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": PORT}]},
}


def is_ready(node: Any) -> bool:
    conditions = node["status"].get("conditions", [])
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def fetched(cluster: Cluster, pod: str, urls: list[str]) -> list[str]:
    """What a pod gets from each URL, a line each."""
    script = "; ".join(f"timeout 10 wget -qO- {url} || echo FAILED {url}" for url in urls)
    return cluster.kubectl("exec", pod, "--", "sh", "-c", script).splitlines()


def test_pods_of_a_real_cluster(cluster: Cluster, record_property: Any) -> None:
    """Nodes become Ready; pods, a Service and a hostPort are reached; deleting them leaves nothing."""
    names = [node.name for node in cluster.nodes]
    until(lambda: all(map(is_ready, cluster.get("nodes", *names)["items"])), "nodes Ready", 120)
    rules = [node.command("iptables-save", "-t", "nat") for node in cluster.nodes]
    assert not any("CNI-DN" in text for text in rules)

    items = [manifest(number, cluster.nodes[number % len(cluster.nodes)]) for number in range(PODS)]
    cluster.kubectl(
        "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    )
    cluster.kubectl("apply", "-f", "-", given=json.dumps(SERVICE))

    def running() -> dict[str, str]:
        pods = cluster.get("pods", "-l", "app=web")["items"]
        ready = [pod for pod in pods if is_ready(pod)]
        return (
            {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in ready} if len(ready) == PODS else {}
        )

    addresses: dict[str, str] = until(running, f"{PODS} pods Ready", 240)
    assert len(set(addresses.values())) == PODS
    known = {pod["pod"]: pod["addresses"] for node in cluster.nodes for pod in node.pods()}
    assert {f"default/{name}": [address] for name, address in addresses.items()}.items() <= known.items()

    urls = [f"http://{address}:{PORT}/" for address in addresses.values()]
    for pod in addresses:
        assert fetched(cluster, pod, urls) == list(addresses), pod
    service = cluster.get("service", "web")["spec"]["clusterIP"]
    for pod in ("web-0", "web-1"):
        answers = fetched(cluster, pod, [f"http://{service}/"] * 10)
        assert set(answers) <= set(addresses), answers
    first, second = cluster.nodes[:2]
    url = f"http://{first.endpoint}:{HOST_PORT}/"
    assert second.command("busybox", "wget", "-qO-", url).strip() == "web-0"
    assert fetched(cluster, "web-2", [url]) == ["web-0"], "a pod of that node, whose traffic comes back to it"

    cluster.kubectl("delete", "pods", "--all", "--wait=true")
    cluster.kubectl("delete", "service", "web")
    for node in cluster.nodes:
        until(node.is_empty, f"{node.name} without pods", 60)
        assert "web" not in node.command("ip", "-d", "link")
        after = node.command("iptables-save", "-t", "nat")
        assert str(HOST_PORT) not in after
        assert "CNI-DN" not in after
    record_property("pods", f"{PODS} on {len(cluster.nodes)} nodes, each reached by each")
