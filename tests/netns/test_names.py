"""The resolver of a real daemon, asked from where pods and hosts ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kube_api import KubeApi
from tests.netns.nodes import REPOSITORY, Node, until
from tests.netns_tools import Namespace, run

pytestmark = pytest.mark.root

ASK = """
import sys
import dns.message, dns.query
server, name, rdtype, over = sys.argv[1:]
query = dns.message.make_query(name, rdtype)
reply = getattr(dns.query, over)(query, server, timeout=5)
print(reply.rcode().name, *[rdata for rrset in reply.answer for rdata in rrset])
"""

SHARED = ("10.96.0.10", "fd96::a")
"""The same on every node, as kubelets tell their pods."""

SERVICES = """
[[service]]
name = "web"
cluster_ips = ["10.43.0.10", "fd43::10"]
ports = [{ name = "http", port = 80 }]
"""


def ask(namespace: Namespace, server: str, name: str, rdtype: str = "A", over: str = "udp") -> str:
    """The rcode and the answer's values."""
    words = [sys.executable, "-c", ASK, server, name, rdtype, over]
    return run(namespace.command(words)).strip()


class Resolver:
    """Another resolver, on an address of a namespace; it knows everything to be 192.0.2.80."""

    PROGRAM = """
import socket, sys
import dns.message, dns.rrset
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], 53))
    print("bound", flush=True)
    while True:
        data, sender = server.recvfrom(4096)
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query, recursion_available=True)
        reply.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.80"))
        server.sendto(reply.to_wire(), sender)
"""

    def __init__(self, namespace: Namespace, address: str) -> None:
        self._command = namespace.command([sys.executable, "-c", self.PROGRAM, address])

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "bound\n"

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


class Kubernetes(Resolver):
    """An API server that knows this Node and a headless service."""

    PROGRAM = """
import asyncio, sys
from aiohttp import web
from tests.kube_api import KubeApi, node
from tests.unit.test_names_kubernetes import HEADLESS, READY, endpoint_slice

async def main():
    nodes, services, slices = KubeApi(), KubeApi(), KubeApi()
    await nodes.put(node("n1", "10.42.1.0/24"))
    await services.put(HEADLESS)
    await slices.put(endpoint_slice("db-a", "db", READY))
    app = web.Application()
    app.router.add_get("/api/v1/nodes", nodes._list)
    app.router.add_get("/api/v1/nodes/{name}", nodes._get)
    app.router.add_patch("/api/v1/nodes/{name}/status", nodes._patch)
    app.router.add_get("/api/v1/services", services._list)
    app.router.add_get("/apis/discovery.k8s.io/v1/endpointslices", slices._list)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, sys.argv[1], 6443).start()
    print("bound", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def cni(node: Node, command: str, pod: Namespace, *, name: str, **capabilities: Any) -> dict[str, Any]:
    """One call of the plugin, as a runtime makes it."""
    conf = {
        "cniVersion": "1.1.0",
        "name": "podloom",
        "type": "podloom-cni",
        "controlSocket": str(node.control_socket),
        "stateDir": node.tables["node"]["state_dir"],
        "runtimeConfig": capabilities,
    }
    environment = {
        **os.environ,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": f"container-{pod.name}",
        "CNI_NETNS": str(pod.path),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/nonexistent",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name}",
    }
    done = subprocess.run(
        node.namespace.command([sys.executable, "-m", "cni"]),
        input=json.dumps(conf),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout)) if done.stdout.strip() else {}


@pytest.fixture
def named(node: Node) -> Node:
    """A node whose resolver is on; its upstream is on the node's own loopback."""
    node.tables["names"] = {"enabled": True, "upstream": ["127.0.0.53"], "addresses": list(SHARED)}
    return node


@pytest.fixture
def pod(netns: Callable[[], Namespace]) -> Namespace:
    return netns()


def resolver_pid(node: Node) -> int | None:
    """The child of the daemon that answers names."""
    assert node.process is not None
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    for child in children:
        if b"forwarder.names" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def start(node: Node) -> None:
    """With services, which are no one-level tables."""
    node.text = lambda: Node.text(node) + SERVICES  # type: ignore[method-assign]
    node.start()


def test_a_pod_is_told_of_the_resolver_and_finds_names(named: Node, pod: Namespace) -> None:
    start(named)
    result = cni(named, "ADD", pod, name="web-0", aliases=["front"])
    assert result["dns"] == {
        "nameservers": ["10.42.1.1", "fd42:0:0:1::1"],
        "search": ["svc.cluster.local", "cluster.local"],
    }
    own = [ip["address"].partition("/")[0] for ip in result["ips"]]
    name = "web-0.shop.pod.cluster.local"
    until(lambda: ask(pod, "10.42.1.1", name) == f"NOERROR {own[0]}", "the pod's own name")
    for server in (*result["dns"]["nameservers"], *SHARED):
        for over in ("udp", "tcp"):
            assert ask(pod, server, "front.shop.pod.cluster.local", "A", over) == f"NOERROR {own[0]}"
            assert ask(pod, server, name, "AAAA", over) == f"NOERROR {own[1]}"
            assert ask(pod, server, "web.default.svc.cluster.local", "A", over) == "NOERROR 10.43.0.10"
    pointer = ".".join(reversed(own[0].split("."))) + ".in-addr.arpa"
    assert ask(pod, "10.42.1.1", pointer, "PTR") == f"NOERROR {name}."
    cni(named, "DEL", pod, name="web-0")
    until(lambda: ask(named.namespace, "10.42.1.1", name) == "NXDOMAIN", "the name's end")


def test_all_else_comes_from_upstream(named: Node) -> None:
    start(named)
    with Resolver(named.namespace, "127.0.0.53"):
        assert ask(named.namespace, "10.42.1.1", "www.example.com") == "NOERROR 192.0.2.80"
    # From the cache, now that nobody is there.
    assert ask(named.namespace, "fd42:0:0:1::1", "WWW.example.com", over="tcp") == "NOERROR 192.0.2.80"
    assert ask(named.namespace, "10.42.1.1", "else.example.com") == "SERVFAIL"


def test_strangers_are_refused(named: Node, netns: Callable[[], Namespace]) -> None:
    """Somebody on the underlay who has a route to the gateway's address."""
    start(named)
    stranger = netns()
    run(["ip", "-n", named.namespace.name, "link", "set", "wire", "netns", stranger.name])
    stranger.ip("addr", "add", "192.0.2.9/24", "dev", "wire")
    stranger.ip("link", "set", "wire", "up")
    named.namespace.ip("link", "set", "eth0", "up")
    stranger.ip("route", "add", "10.42.1.1/32", "via", "192.0.2.1")
    assert ask(stranger, "10.42.1.1", "web.default.svc.cluster.local") == "REFUSED"
    assert ask(stranger, "10.42.1.1", "web.default.svc.cluster.local", over="tcp") == "REFUSED"
    assert ask(named.namespace, "10.42.1.1", "web.default.svc.cluster.local") == "NOERROR 10.43.0.10"


def test_a_killed_resolver_comes_back_and_ends_with_the_daemon(named: Node) -> None:
    start(named)
    first = resolver_pid(named)
    assert first is not None
    until(lambda: uid_of(first) == 65534, "the resolver gives up root")
    os.kill(first, signal.SIGKILL)
    # Asked while nobody serves: the socket is the daemon's, so the query waits for the next one.
    assert ask(named.namespace, "10.42.1.1", "web.default.svc.cluster.local") == "NOERROR 10.43.0.10"
    second = until(lambda: resolver_pid(named), "another resolver")
    assert second != first
    assert named.process is not None
    named.process.kill()
    named.process.wait()
    until(lambda: not Path(f"/proc/{second}").exists(), "the resolver's end")


def uid_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Uid:")))


def test_services_are_reloaded(named: Node) -> None:
    start(named)
    named.text = lambda: Node.text(named) + SERVICES.replace("10.43.0.10", "10.43.0.11")  # type: ignore[method-assign]
    named.write_config()
    done = named.run("names")
    assert "10.43.0.10" in done.stdout
    assert named.process is not None
    named.process.send_signal(signal.SIGHUP)
    name = "web.default.svc.cluster.local"
    until(lambda: ask(named.namespace, "10.42.1.1", name) == "NOERROR 10.43.0.11", "the new address")


def test_services_come_from_kubernetes(named: Node, tmp_path: Path) -> None:
    api = KubeApi()
    api.url = "http://127.0.0.1:6443"
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
    named.tables["discovery"] = {
        "source": "kubernetes",
        "node_name": "n1",
        "kubeconfig": str(kubeconfig),
    }
    del named.tables["node"]["prefixes"]
    name = "db.shop.svc.cluster.local"
    with Kubernetes(named.namespace, "127.0.0.1"):
        named.start()
        until(lambda: ask(named.namespace, "10.42.1.1", name) == "NOERROR 10.42.1.5", "the service's name")
        assert ask(named.namespace, "10.42.1.1", "absent.shop.svc.cluster.local") == "NXDOMAIN"
    assert ask(named.namespace, "10.42.1.1", name) == "NOERROR 10.42.1.5", "without the API server"


def test_what_a_person_reads(named: Node) -> None:
    start(named)
    done = named.run("names", "web.default.svc")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["web.default.svc.cluster.local", "A", "5", "10.43.0.10"] in rows
    assert ["web.default.svc.cluster.local", "AAAA", "5", "fd43::10"] in rows
    done = named.run("names", "10.43.0.10")
    assert "web.default.svc.cluster.local." in done.stdout
    done = named.run("names", "www.example.com")
    assert done.stdout == "www.example.com is not below cluster.local: asked of 127.0.0.53\n"
    done = named.run("names", "absent.default.svc.cluster.local")
    assert done.stdout == "absent.default.svc.cluster.local has no record\n"


def test_without_a_resolver_that_is_said(node: Node) -> None:
    node.start()
    done = node.run("names")
    assert (done.returncode, done.stdout) == (1, "")
    assert "set names.enabled = true" in done.stderr
    assert resolver_pid(node) is None


def test_a_taken_port_is_named(named: Node) -> None:
    named.write_config()
    with Resolver(named.namespace, "0.0.0.0"):
        assert named.popen("up").wait(30) == 1
    assert "cannot answer names on 10.42.1.1 UDP port 53" in named.log
    assert "names.enabled = false" in named.log
