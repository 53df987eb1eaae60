"""A cluster of five thousand nodes that come and go, seen from one of them by a real etcd: what a change
costs it, and what does not grow with the cluster."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import crowd, loops
from bench.bench_daemon import resident_kib
from bench.conftest import one_cpu
from bench.crowd import PORTS, Churn, Place, Registry
from fastpath.table import PrefixTable
from forwarder.demo import netns
from forwarder.demo.lab import CLUSTER, START_SECONDS, UNDERLAY, VNI, Host, Lab, Node, link_index, netlink
from forwarder.demo.probes import Station, ping
from forwarder.peers import HEALTH

FEW, PEERS = 10, 5_000
CHANGES_A_SECOND = 10
LOOKUPS, PASSES, TRIES = 4096, 4, 50
IDLE_SECONDS = 4.0
CHURN_SECONDS = 8.0
SETTLE_SECONDS = 8.0
"""Until probes of all have gone both ways a few times, some seconds apart."""
ROUNDS = 20
JOIN_SECONDS = 30.0
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@pytest.mark.benchmark(group="scale: lookup")
@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
def test_lookup_among_thousands_of_nodes(benchmark: BenchmarkFixture, family: int) -> None:
    few, many = (prefixes_and_pods(count, family) for count in (FEW, PEERS))
    with one_cpu():
        fast = [lookup_ns(*few), lookup_ns(*many)]
        benchmark(loops.lookup, *many, PASSES)
        fast = [min(fast[0], lookup_ns(*few)), min(fast[1], lookup_ns(*many))]
    benchmark.extra_info["packets"] = LOOKUPS * PASSES
    benchmark.extra_info["times_the_cost_of_10_peers"] = round(fast[1] / fast[0], 2)
    show(benchmark, f"IPv{family} lookup, ns", *fast)
    assert fast[1] <= 1.5 * fast[0]


def prefixes_and_pods(count: int, family: int) -> tuple[PrefixTable, memoryview]:
    """A table of so many nodes' prefixes, and pods spread over them in no order the memory could guess."""
    table = PrefixTable()
    networks = []
    for number in range(count):
        networks += [ip_network(crowd.prefixes(number)[0 if family == 4 else 1])]
        for text in crowd.prefixes(number):
            prefix = ip_network(text)
            table.insert(prefix.network_address.packed, prefix.prefixlen, number + 1)
    pods = b"".join((networks[i * 40_503 % count][i % 7 + 1]).packed for i in range(LOOKUPS))
    return table, memoryview(pods).cast("B", (LOOKUPS, len(pods) // LOOKUPS))


def lookup_ns(table: PrefixTable, pods: memoryview) -> float:
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        loops.lookup(table, pods, PASSES)
        took.append(time.perf_counter() - began)
    return min(took) / LOOKUPS / PASSES * 1e9


@dataclass
class Cluster:
    """Two real nodes with a pod each, and the crowd."""

    lab: Lab
    node: Node
    pods: tuple[Station, Station]
    registry: Registry
    place: Place

    @property
    def pid(self) -> int:
        return self.lab.daemon(self.node).pid

    def wait_for_peers(self, count: int) -> float:
        """Seconds until the node has so many, the other real one among them."""
        began = time.monotonic()
        while (found := self.lab.ask(self.node, "status")["peers"]) != count + 1:
            assert time.monotonic() - began < JOIN_SECONDS, f"{found} peers"
        return time.monotonic() - began

    def kernel_entries(self) -> frozenset[str]:
        """Routes and neighbours of the node, all tables and families; but for neighbours on the link itself,
        which come and go as the hosts there speak."""
        found = set()
        with netlink(self.node.namespace) as ip:
            for family in (socket.AF_INET, socket.AF_INET6):
                for route in ip.get_routes(family=family):
                    found.add(f"{route.get('RTA_DST')}/{route['dst_len']} table {route.get('RTA_TABLE')}")
                for neighbour in ip.get_neighbours(family=family):
                    address = ip_address(neighbour.get("NDA_DST"))
                    if not address.is_link_local and not any(address in net for net in UNDERLAY.values()):
                        found.add(f"neighbour {address}")
        return frozenset(found)

    def change_seconds(self, number: int, port: int) -> float:
        """How long after a node has said that it moves there, what a pod sends to it goes there."""
        target = str(ip_network(crowd.prefixes(number)[0])[1])
        self.place.drain(port)
        with netns.open_socket(self.pods[0].namespace, socket.AF_INET, socket.SOCK_DGRAM) as pod:
            began = time.monotonic()
            self.registry.put([number], port)
            while True:
                pod.sendto(b"?", (target, 9))
                if self.place.arrives(port, 0.0005):
                    return time.monotonic() - began
                assert time.monotonic() - began < JOIN_SECONDS, "the change did not come"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("not root: a daemon with thousands of peers is NOT measured in this run")
    if shutil.which("etcd") is None:
        pytest.skip("no etcd (Debian package etcd-server): thousands of peers are NOT measured in this run")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(f"bench-{os.getpid():x}", source="etcd"))
        nodes = [lab.add_node() for _ in range(2)]
        host = lab.add_host("crowd")
        for node in nodes:
            lead_to_crowd(node, host)
        take_for_crowd(host)
        for node in nodes:
            lab.launch(node, configuration(lab, node))
            lab.wait_ready(node, time.monotonic() + START_SECONDS)
        pods = [lab.add_pod(node, name) for node, name in zip(nodes, ("a", "b"), strict=True)]
        one, two = (Station(pod.name, pod.namespace, pod.ips) for pod in pods)
        registry = stack.enter_context(closing(Registry(lab.wire, lab.etcd.url)))
        place = stack.enter_context(closing(Place(host.namespace)))
        yield Cluster(lab, nodes[0], (one, two), registry, place)


def lead_to_crowd(node: Node, host: Host) -> None:
    with netlink(node.namespace) as ip:
        ip.route("add", dst=crowd.ENDPOINTS, gateway=host.underlay["ipv4"])


def take_for_crowd(host: Host) -> None:
    with netlink(host.namespace) as ip:
        lo = link_index(ip, "lo")
        ip.link("set", index=lo, state="up")
        ip.route("add", dst=crowd.ENDPOINTS, oif=lo, type="local", table=255, scope=254)


def configuration(lab: Lab, node: Node) -> str:
    """As the lab's own, with prefixes that the crowd has not."""
    return f"""
[cluster]
cidrs = ["{CLUSTER[0]}", "{CLUSTER[1]}"]
vni = {VNI}
[node]
id = "{node.name}"
router_mac = "{node.router_mac}"
endpoints = ["{node.underlay["ipv4"]}"]
prefixes = ["10.71.{250 + node.index}.0/24", "fd71:0:0:{node.index:x}::/64"]
state_dir = "{node.directory / "state"}"
run_dir = "{node.control_socket.parent}"
ip_masquerade = false
[discovery]
source = "etcd"
urls = ["{lab.etcd.url}"]
[health]
enabled = {str(node.index == 1).lower()}
"""


@pytest.mark.benchmark(group="scale: a change, from its writer to the fast path")
def test_five_thousand_nodes_come_and_go(benchmark: BenchmarkFixture, cluster: Cluster) -> None:
    cluster.registry.put(range(FEW))
    cluster.wait_for_peers(FEW)
    assert ping([cluster.pods, cluster.pods[::-1]]).lost == ()
    few_ms = statistics.median(change_all(cluster, range(FEW)))
    few = observe(cluster)
    cluster.registry.features = (HEALTH,)
    cluster.registry.put(range(FEW))
    probed = observe(cluster)
    cluster.registry.features = ()

    began = time.monotonic()
    cluster.registry.put(range(FEW, PEERS))
    cluster.wait_for_peers(PEERS)
    benchmark.extra_info["seconds_until_all_are_peers"] = round(time.monotonic() - began, 2)
    quiet = observe(cluster)
    cluster.registry.features = (HEALTH,)
    cluster.registry.put(range(PEERS))
    time.sleep(SETTLE_SECONDS)
    many = observe(cluster)

    with churning(cluster) as churn:
        cpu, changes = cpu_seconds(cluster.pid), churn.changes
        lost = ping_for(cluster, CHURN_SECONDS)
        busy = (cpu_seconds(cluster.pid) - cpu) / CHURN_SECONDS * 100
        changes = churn.changes - changes
        numbers = iter(range(ROUNDS))
        benchmark.pedantic(
            lambda number: cluster.change_seconds(number, PORTS[1]),
            setup=lambda: ((next(numbers),), {}),
            rounds=ROUNDS,
        )
    cluster.wait_for_peers(PEERS)
    after = observe(cluster, seconds=0)

    states = Counter(peer["health"]["state"] for peer in cluster.lab.ask(cluster.node, "peers"))
    benchmark.extra_info |= {
        "peers_up": states["up"],
        "lost_pings_between_stable_nodes": len(lost),
        "cpu_percent_at_10_changes_a_second": round(busy, 1),
        "cpu_ms_per_change": round((busy - many.cpu_percent) * 10 * CHURN_SECONDS / changes, 2),
    }
    show(benchmark, "resident, MiB", few.resident_mib, many.resident_mib)
    show(benchmark, "CPU without probes, %", few.cpu_percent, quiet.cpu_percent)
    show(benchmark, "CPU with probes to all, %", probed.cpu_percent, many.cpu_percent)
    show(benchmark, "kernel routes and neighbours", len(few.kernel_entries), len(many.kernel_entries))
    if benchmark.stats is not None:
        show(benchmark, "a change, ms", few_ms * 1e3, benchmark.stats.stats.median * 1e3)
    print(f"\n{benchmark.name}: {dict(benchmark.extra_info)}")
    assert lost == ()
    assert states["up"] >= PEERS - CHANGES_A_SECOND * SETTLE_SECONDS
    assert few.kernel_entries == many.kernel_entries == after.kernel_entries


def churning(cluster: Cluster) -> Churn:
    registry = Registry(cluster.lab.wire, cluster.lab.etcd.url)
    registry.features = cluster.registry.features
    return Churn(registry, range(PEERS // 2, PEERS), CHANGES_A_SECOND)


@dataclass(frozen=True)
class Observed:
    resident_mib: float
    cpu_percent: float
    kernel_entries: frozenset[str]


def observe(cluster: Cluster, seconds: float = IDLE_SECONDS) -> Observed:
    """The node's daemon while nothing happens: path measurements, probes and renewals go on."""
    began = cpu_seconds(cluster.pid)
    time.sleep(seconds)
    used = cpu_seconds(cluster.pid) - began
    return Observed(
        resident_kib(cluster.pid) / 1024,
        used / seconds * 100 if seconds else 0.0,
        cluster.kernel_entries(),
    )


def cpu_seconds(pid: int) -> float:
    """What a process has used, in user and kernel mode (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


def change_all(cluster: Cluster, numbers: range) -> list[float]:
    """The nodes move to the second port and back: how long each first move took."""
    took = [cluster.change_seconds(number, PORTS[1]) for number in numbers]
    cluster.registry.put(numbers)
    return took


def ping_for(cluster: Cluster, seconds: float) -> tuple[str, ...]:
    """Echoes between the real nodes' pods, some twenty a second; those that were lost."""
    lost: list[str] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lost += ping([cluster.pods]).lost
        time.sleep(0.1)
    return tuple(lost)


def show(benchmark: BenchmarkFixture, what: str, few: float, many: float) -> None:
    """A figure with few and with many peers, for extra_info and the plot."""
    figures: dict[str, Any] = benchmark.extra_info.setdefault("scale", {})
    figures[what] = {f"{FEW} peers": round(few, 2), f"{PEERS} peers": round(many, 2)}
