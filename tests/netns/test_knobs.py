"""Every combination of the offload switches delivers the same bytes, between two pods of a real lab: TCP, UDP
with and without superframes of the sender's own, pings and fragments, over IPv4 and IPv6.

One lab serves all: the switches are turned while it runs, one at a time.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from forwarder.control.client import ask
from forwarder.demo import netns
from forwarder.demo.features import switch_off
from forwarder.demo.lab import Lab, Node
from forwarder.demo.probes import Station, Transfer, family_of, ping, transfer
from forwarder.offloads import ABOUT
from tests.netns.foreign import NO_CHECKSUM_OFFLOAD
from tests.netns.labs import new_lab

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

SECONDS = 5.0
UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
FRAGMENTED_BYTES = 5_000
TRAIN_SIZE, TRAIN_COUNT = 1_200, 20

WITH_UPLINK = """
[offload]
uplink = "on"
"""


@dataclass(frozen=True)
class Ends:
    """Two pods on two nodes."""

    lab: Lab
    nodes: tuple[Node, Node]
    one: Station
    other: Station

    def switch(self, name: str, on: bool) -> None:
        for node in self.nodes:
            said = ask(node.control_socket, "offload", {"name": name, "on": on})
            assert said["on"] == on, f"{name} on {node.name}: {said['reason']}"

    def assert_nothing_was_dropped(self) -> None:
        for node in self.nodes:
            for direction, reasons in ask(node.control_socket, "drops").items():
                assert not any(reasons.values()), (node.name, direction, reasons)


@pytest.fixture(
    params=[("geneve", "ipv4", "as they come"), ("vxlan", "ipv6", "without offload")], ids=" ".join
)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """The wire's veths as they come carry superframes whole; without offload they are cut, as by a card."""
    encapsulation, underlay, veths = request.param
    with new_lab(encapsulation, underlay, extra_config=WITH_UPLINK) as lab:
        nodes = lab.add_node(), lab.add_node()
        if veths == "without offload":
            for node in nodes:
                switch_off(node.namespace, "eth0", *NO_CHECKSUM_OFFLOAD, "tx-tcp-segmentation")
        lab.start()
        pods = [lab.add_pod(node, f"p{node.index}") for node in nodes]
        one, other = (Station(pod.name, pod.namespace, pod.ips) for pod in pods)
        yield Ends(lab, nodes, one, other)


def switches(ends: Ends) -> list[str]:
    """Those that this machine's kernel lets us turn on; the others are off in every combination. Spinning
    and the TAP's thread are on in all: they touch no packet."""
    state = ask(ends.nodes[0].control_socket, "status")["offloads"]
    assert state.keys() == ABOUT.keys()
    missing = [name for name, offload in state.items() if not offload["on"]]
    assert set(missing) <= {"uplink"}, state
    return [name for name in state if name not in {*missing, "threaded_napi", "spin"}]


def gray(count: int) -> Iterator[int]:
    """The switch to turn next: the 2**count - 1 turns meet every other combination once (a Gray code)."""
    for number in range(1, 1 << count):
        yield (number & -number).bit_length() - 1


def every_combination(ends: Ends) -> Iterator[dict[str, bool]]:
    state = dict.fromkeys(switches(ends), True)
    seen = set()
    names = list(state)
    for turn in itertools.chain([None], gray(len(names))):
        if turn is not None:
            state[names[turn]] = not state[names[turn]]
            ends.switch(names[turn], state[names[turn]])
        seen.add(tuple(state.values()))
        yield state
    assert len(seen) == 1 << len(names)


class Udp:
    """A sender and a receiver; the receiver knows how long each datagram was, in a train or not."""

    def __init__(self, stack: ExitStack, source: Station, destination: Station, address: str) -> None:
        family = family_of(address)
        self.receiver = stack.enter_context(
            netns.open_socket(destination.namespace, family, socket.SOCK_DGRAM)
        )
        self.sender = stack.enter_context(netns.open_socket(source.namespace, family, socket.SOCK_DGRAM))
        self.receiver.settimeout(SECONDS)
        self.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.receiver.bind((address, 0))
        self.sender.connect(self.receiver.getsockname())

    def set_gro(self, on: bool) -> None:
        """Whether trains may come in one piece."""
        self.receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, int(on))

    def send_train(self, payload: bytes, size: int) -> None:
        """One call, cut by the kernel or by whoever it leaves that to."""
        self.sender.sendmsg([payload], [(socket.IPPROTO_UDP, UDP_SEGMENT, size.to_bytes(2, "little"))])

    def receive(self, count: int) -> list[bytes]:
        datagrams: list[bytes] = []
        while len(datagrams) < count:
            data, control, _, _ = self.receiver.recvmsg(1 << 16, 64)
            sizes = [int.from_bytes(value, "little") for _, kind, value in control if kind == UDP_GRO]
            size = sizes[0] if sizes else max(len(data), 1)
            datagrams += [data[at : at + size] for at in range(0, max(len(data), 1), size)]
        return datagrams


class Traffic:
    """Both ways at once would hide which way lost what: IPv4 goes one way, IPv6 the other."""

    def __init__(self, stack: ExitStack, ends: Ends, tcp_bytes: int, trains: int) -> None:
        self.ends = ends
        self.random = random.Random(71)
        self.tcp_bytes, self.trains = tcp_bytes, trains
        self.ways = []
        for source, destination, family in (
            (ends.one, ends.other, socket.AF_INET),
            (ends.other, ends.one, socket.AF_INET6),
        ):
            address = destination.address(family)
            assert address is not None
            self.ways.append((source, destination, address, Udp(stack, source, destination, address)))

    def carry(self) -> None:
        for source, destination, address, udp in self.ways:
            result = transfer(source, destination, address, self.random.randbytes(self.tcp_bytes))
            assert result.hash_ok, result
            for gro in (False, True):
                udp.set_gro(gro)
                for _ in range(self.trains):
                    self.carry_train(udp)
                self.carry_singly(udp)
            udp.set_gro(False)
            datagram = self.random.randbytes(FRAGMENTED_BYTES)
            udp.sender.send(datagram)
            assert udp.receive(1) == [datagram]
        assert ping([(self.ends.one, self.ends.other), (self.ends.other, self.ends.one)]).lost == ()

    def carry_train(self, udp: Udp) -> None:
        payload = self.random.randbytes(TRAIN_SIZE * TRAIN_COUNT + 7)
        udp.send_train(payload, TRAIN_SIZE)
        sent = [payload[at : at + TRAIN_SIZE] for at in range(0, len(payload), TRAIN_SIZE)]
        assert udp.receive(len(sent)) == sent

    def carry_singly(self, udp: Udp) -> None:
        """Sizes that a train could have, and could not."""
        sent = [self.random.randbytes(size) for size in (700, 700, 700, 9, 700, 1_000, 1, 1, 0, 1_400)]
        for datagram in sent:
            udp.sender.send(datagram)
        assert udp.receive(len(sent)) == sent


@pytest.mark.parametrize(
    ("tcp_bytes", "trains"),
    [
        (400_000, 2),
        pytest.param(8 << 20, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1_200)]),
    ],
    ids=["little", "much"],
)
def test_every_combination_delivers_the_same_bytes(ends: Ends, tcp_bytes: int, trains: int) -> None:
    with ExitStack() as stack:
        traffic = Traffic(stack, ends, tcp_bytes, trains)
        for state in every_combination(ends):
            try:
                traffic.carry()
                ends.assert_nothing_was_dropped()
            except (AssertionError, OSError) as error:
                error.add_note(f"with {', '.join(f'{name} {on}' for name, on in state.items())}")
                raise


def test_switching_disturbs_no_transfer(ends: Ends) -> None:
    """What is under way when a switch turns still arrives, once and whole."""
    transfers: queue.Queue[Transfer] = queue.Queue()
    stop = threading.Event()

    def send() -> None:
        for address in itertools.cycle(ends.other.ips):
            transfers.put(transfer(ends.one, ends.other, address, os.urandom(1 << 20)))
            if stop.is_set():
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in every_combination(ends):
            result = transfers.get(timeout=2 * SECONDS)  # so that each state sees some of one
            assert result.hash_ok, result
    finally:
        stop.set()
        sender.join()
    ends.assert_nothing_was_dropped()
