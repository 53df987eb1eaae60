"""Two nodes' health, joined by a wire that a test can cut, slow down or narrow, in a time of its own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from forwarder.health import Health, PeerHealth, Send, State
from forwarder.probe import decode

DEVICE_MTU = 1500
ONE, TWO = "one", "two"
OTHER = {ONE: TWO, TWO: ONE}


@dataclass
class Direction:
    """From one node to the other. `loses` is asked with each probe."""

    delay: float = 0.001
    carries: int = 65_535
    loses: Callable[[Send], bool] = lambda _: False
    is_cut: bool = False
    sent: int = 0


@dataclass
class Wire:
    seed: int = 0
    interval_seconds: float = 1.0
    detect_multiplier: int = 3
    now: float = 1000.0
    kernel_mtu: int = DEVICE_MTU
    nodes: dict[str, Health] = field(default_factory=dict)
    changes: dict[str, list[State]] = field(default_factory=lambda: {ONE: [], TWO: []})

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.directions = {ONE: Direction(), TWO: Direction()}
        self._under_way: list[tuple[float, int, str, Send]] = []
        self._order = count()
        for name in (ONE, TWO):
            self.start(name)

    def start(self, name: str) -> None:
        """A node's daemon begins, or begins again."""
        self.nodes[name] = Health(
            self.random.randrange(1, 1 << 32),
            self.random.random,
            interval_seconds=self.interval_seconds,
            detect_multiplier=self.detect_multiplier,
        )
        self.nodes[name].add(OTHER[name], self.now)
        self.nodes[name].limit(OTHER[name], self.kernel_mtu)

    def stop(self, name: str) -> None:
        del self.nodes[name]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while (at := self._next_at()) <= until:
            self.now = max(self.now, at)
            while self._under_way and self._under_way[0][0] <= self.now:
                _, _, name, send = heapq.heappop(self._under_way)
                self._deliver(name, send)
            for name, node in self.nodes.items():
                if (due := node.next_at()) is not None and due <= self.now:
                    self._take(name, node.poll(self.now))
        self.now = until

    def run_until(self, condition: Callable[[], bool], within: float) -> float:
        """Seconds until it was so; AssertionError if it never was."""
        begun = self.now
        while not condition():
            assert self.now < begun + within, f"not within {within} s"
            self.run(0.01)
        return self.now - begun

    def _next_at(self) -> float:
        times = [at for node in self.nodes.values() if (at := node.next_at()) is not None]
        return min([*times, *(item[0] for item in self._under_way[:1])], default=float("inf"))

    def _take(self, name: str, sends: list[Send]) -> None:
        direction = self.directions[name]
        for send in sends:
            direction.sent += 1
            size = send.size_bytes or 114
            if not (direction.is_cut or size > direction.carries or direction.loses(send)):
                item = (self.now + direction.delay, next(self._order), OTHER[name], send)
                heapq.heappush(self._under_way, item)
        for state in self.nodes[name].take_changes().values():
            self.changes[name].append(state)

    def _deliver(self, name: str, send: Send) -> None:
        message = decode(send.probe)
        assert message is not None
        if name in self.nodes:
            self._take(name, self.nodes[name].hear(OTHER[name], message, self.now))

    def state(self, name: str) -> State:
        return self.of(name).state

    def of(self, name: str) -> PeerHealth:
        health = self.nodes[name].state(OTHER[name], self.now)
        assert health is not None
        return health

    def states(self) -> tuple[State, State]:
        return self.state(ONE), self.state(TWO)

    def short(self, name: str) -> int | None:
        return self.of(name).short_path_bytes
