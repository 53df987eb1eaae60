"""What the demo proves, step by step, and what came out of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations

from forwarder.demo.lab import START_SECONDS, Lab, LabError, Node, Pod
from forwarder.demo.probes import Echoes, Pings, Station, Transfer, ping, transfer, udp_echo

TRANSFER_BYTES = 32 << 20
ECHO_BYTES = 2000  # more than a pod's MTU, so that it crosses as inner fragments
ECHO_COUNT = 5

JOIN_SECONDS = 2.0
LEAVE_SECONDS = 15.0

_FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass
class Outcome:
    """Filled in as the demo goes on."""

    nodes: int
    encapsulation: str
    underlay: str
    source: str = "static"
    pods: list[Pod] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pings: list[Pings] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    echoes: list[Echoes] = field(default_factory=list)
    drops: dict[str, dict[str, int]] = field(default_factory=dict)
    """Node -> drop reason -> packets, those that are not zero."""
    seconds: float = 0.0
    error: str | None = None
    kept_as: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.checks) and all(check.ok for check in self.checks)


class Checks:
    """The steps in their order; each tells `done` what it found, and writes it into the outcome."""

    def __init__(self, lab: Lab, outcome: Outcome, done: Callable[[Check], None]) -> None:
        self._lab = lab
        self._outcome = outcome
        self._done = done

    def steps(self, pods_per_node: int) -> list[tuple[str, Callable[[], None]]]:
        """(what is being done, in words; the step). LabError from a step: going on makes no sense."""
        tcp = f"sending {TRANSFER_BYTES >> 20} MiB from node to node over TCP and "
        udp = f"echoing {ECHO_BYTES} bytes over UDP and "
        return [
            (f"starting {self._outcome.nodes} nodes", self.start_nodes),
            (f"attaching {pods_per_node} pods to each node", lambda: self.attach_pods(pods_per_node)),
            ("pinging from every pod to every pod", self.ping_pods),
            ("pinging between pods and nodes", self.ping_nodes),
            *((tcp + family, lambda family=family: self.send_tcp(family)) for family in _FAMILIES),
            *((udp + family, lambda family=family: self.echo_udp(family)) for family in _FAMILIES),
            ("moving a pod to another node", self.move_pod),
            ("reading the drop counters", self.read_drops),
            *(self._growth() if self._outcome.source == "etcd" else []),
        ]

    def _growth(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("letting another node join", self.join),
            ("killing a node", self.kill_node),
            ("letting a node take the dead one's place", self.replace_node),
        ]

    def start_nodes(self) -> None:
        began = time.monotonic()
        for _ in range(self._outcome.nodes):
            self._lab.add_node()
        self._lab.start()
        seconds = time.monotonic() - began
        self._tell("nodes", True, f"{len(self._lab.nodes)} daemons answer after {seconds:.1f} s")

    def attach_pods(self, pods_per_node: int) -> None:
        began = time.monotonic()
        for index in range(len(self._lab.nodes) * pods_per_node):
            self._lab.add_pod(self._lab.nodes[index // pods_per_node], f"p{index + 1}")
        each = (time.monotonic() - began) / len(self._lab.pods)
        for pod in self._lab.pods:
            for family in _FAMILIES.values():
                _address(_station(pod), family)
        detail = f"{len(self._lab.pods)} attached by the CNI plugin, {each * 1000:.0f} ms each"
        self._tell("pods", True, detail)

    def ping_pods(self) -> None:
        pairs = list(permutations(self._lab.pods, 2))
        self._ping("ping across nodes", ((a, b) for a, b in pairs if a.node is not b.node))
        if len(self._lab.pods) > len(self._lab.nodes):
            self._ping("ping on one node", ((a, b) for a, b in pairs if a.node is b.node))

    def ping_nodes(self) -> None:
        pairs = [(pod, node) for pod in self._lab.pods for node in self._lab.nodes]
        self._ping("ping pod to node", pairs)
        self._ping("ping node to pod", ((node, pod) for pod, node in pairs))

    def send_tcp(self, family: str) -> None:
        payload = os.urandom(TRANSFER_BYTES)
        transfers = [transfer(a, b, _address(b, _FAMILIES[family]), payload) for a, b in self._ring()]
        self._outcome.transfers += transfers
        wrong = [f"{t.source} -> {t.destination}: {t.bytes} bytes came" for t in transfers if not t.hash_ok]
        rates = sorted(t.gbps for t in transfers)
        detail = f"{len(transfers)} x {TRANSFER_BYTES >> 20} MiB, hash equal"
        detail += f", {rates[0]:.2f} to {rates[-1]:.2f} Gb/s"
        self._tell(f"TCP {family}", not wrong, "; ".join(wrong) or detail)

    def echo_udp(self, family: str) -> None:
        echoes = [
            udp_echo(a, b, _address(b, _FAMILIES[family]), ECHO_BYTES, ECHO_COUNT) for a, b in self._ring()
        ]
        self._outcome.echoes += echoes
        faults = [one.fault for one in echoes if one.fault is not None]
        detail = f"{len(echoes)} x {ECHO_COUNT} x {ECHO_BYTES} bytes came back"
        self._tell(f"UDP {family} in fragments", not faults, "; ".join(faults) or detail)

    def move_pod(self) -> None:
        mover, goal = self._lab.pods[0], self._lab.nodes[-1]
        self._lab.delete_pod(mover)
        moved = self._lab.add_pod(goal, mover.name)
        others: list[Pod | Node] = [*(pod for pod in self._lab.pods if pod is not moved), *self._lab.nodes]
        pairs: list[tuple[Pod | Node, Pod | Node]] = [(other, moved) for other in others]
        self._ping(
            f"{mover.name} moved from {mover.node.name} to {goal.name}", pairs + [(b, a) for a, b in pairs]
        )

    def read_drops(self) -> None:
        for node in self._lab.nodes:
            total: dict[str, int] = {}
            for reasons in self._lab.ask(node, "drops").values():
                for reason, count in reasons.items():
                    if count:
                        total[reason] = total.get(reason, 0) + count
            self._outcome.drops[node.name] = total

    def join(self) -> None:
        node = self._lab.add_node()
        self._lab.launch(node)
        answered_at = self._lab.wait_ready(node, time.monotonic() + START_SECONDS)
        pairs = [(_station(node), _station(pod)) for pod in self._lab.pods]
        while (pings := ping(pairs, 0.2)).lost and time.monotonic() - answered_at < JOIN_SECONDS:
            pass
        seconds = time.monotonic() - answered_at
        detail = (
            f"{node.name} reached {pings.received} of {pings.sent} addresses {seconds:.1f} s after its start"
        )
        self._tell("a node joins", not pings.lost and seconds < JOIN_SECONDS, detail)
        self._check_tables("tables with it")
        self._lab.add_pod(node, "late")

    def kill_node(self) -> None:
        self._reserve_what_is_free()
        victim = self._dispensable()
        self._lab.kill(victim)
        self._killed_at, self._victim = time.monotonic(), victim
        deadline = self._killed_at + LEAVE_SECONDS
        while (wrong := self._wrong_tables()) and time.monotonic() < deadline:
            time.sleep(0.1)
        seconds = time.monotonic() - self._killed_at
        detail = f"{victim.name} was no peer any more {seconds:.1f} s after its kill -9"
        self._tell("a node dies", not wrong, "; ".join(wrong) or detail)
        self.ping_pods()
        held = self._lab.etcd.claims().get(victim.prefixes[0])
        self._tell("its prefix is withheld", held == victim.name, f"{victim.prefixes[0]} is held for {held}")

    def replace_node(self) -> None:
        node = self._lab.add_node()
        self._lab.launch(node)
        self._lab.wait_ready(node, self._killed_at + 2 * self._lab.etcd.HOLD_SECONDS + START_SECONDS)
        seconds = time.monotonic() - self._killed_at
        prefix, least = self._victim.prefixes[0], self._lab.etcd.HOLD_SECONDS * 2 / 3
        detail = f"{node.name} got {node.prefixes[0]} {seconds:.1f} s after {self._victim.name} died"
        right = node.prefixes[0] == prefix and seconds >= least
        self._tell("its prefix is used again", right, f"{detail}, held for {least:.0f} s at least")
        self._lab.add_pod(node, "new")
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._wrong_tables() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._check_tables("tables at the end")
        self.ping_pods()

    def _dispensable(self) -> Node:
        """A node without which there are still pods on two; the first only if no other is one."""
        first, *others = self._lab.nodes
        for node in others:
            if len({pod.node.name for pod in self._lab.pods} - {node.name}) > 1:
                return node
        return first

    def _reserve_what_is_free(self) -> None:
        """So that the next node can have none but the dead one's."""
        prefix = self._lab.nodes[0].prefixes[0]
        claimed = self._lab.etcd.claims()
        for other in prefix.supernet(self._lab.etcd.PREFIXES.bit_length() - 1).subnets(
            new_prefix=prefix.prefixlen
        ):
            if other not in claimed:
                self._lab.etcd.reserve(other)

    def _check_tables(self, name: str) -> None:
        wrong = self._wrong_tables()
        detail = f"each of {len(self._lab.nodes)} nodes knows all others and their prefixes, and nobody else"
        self._tell(name, not wrong, "; ".join(wrong) or detail)

    def _wrong_tables(self) -> list[str]:
        prefixes = {node.name: {str(prefix) for prefix in node.prefixes} for node in self._lab.nodes}
        wrong = []
        for node in self._lab.nodes:
            known = {peer["id"]: set(peer["prefixes"]) for peer in self._lab.ask(node, "peers")}
            expected = {name: value for name, value in prefixes.items() if name != node.name}
            if known != expected:
                wrong.append(f"{node.name} knows {', '.join(known) or 'nobody'}")
        return wrong

    def _ring(self) -> list[tuple[Station, Station]]:
        """A pod of each node with one of the next, of the last with one of the first."""
        first = [_station(next(p for p in self._lab.pods if p.node is node)) for node in self._lab.nodes]
        return list(zip(first, first[1:] + first[:1], strict=True))

    def _ping(self, name: str, pairs: Iterable[tuple[Pod | Node, Pod | Node]]) -> None:
        pings = ping((_station(source), _station(destination)) for source, destination in pairs)
        self._outcome.pings.append(pings)
        detail = f"{pings.received} of {pings.sent} sent at once came back"
        detail += f", median {pings.median_seconds * 1e3:.2f} ms"
        if pings.lost:
            detail += f"; lost: {', '.join(pings.lost[:5])}"
            detail += f" and {len(pings.lost) - 5} more" if len(pings.lost) > 5 else ""
        self._tell(name, pings.sent > 0 and not pings.lost, detail)

    def _tell(self, name: str, ok: bool, detail: str) -> None:
        check = Check(name, ok, detail)
        self._outcome.checks.append(check)
        self._done(check)


def _station(who: Pod | Node) -> Station:
    return Station(who.name, who.namespace, who.ips if isinstance(who, Pod) else who.gateways)


def _address(station: Station, family: socket.AddressFamily) -> str:
    address = station.address(family)
    if address is None:
        raise LabError(f"{station.name} was given no {family.name} address, but {', '.join(station.ips)}")
    return address
