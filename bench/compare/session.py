"""One run: systems are set up side by side, measured in interleaved rounds, and removed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench.compare import measure
from bench.compare.options import Options
from bench.compare.pods import Pair
from bench.compare.report import Sample, Trouble
from bench.compare.systems import SYSTEMS
from forwarder.demo.lab import Lab, LabError

MEASURE: dict[str, Callable[[Pair, float], measure.Values]] = {
    "tcp1": partial(measure.tcp, 1),
    "tcp4": partial(measure.tcp, 4),
    "tcp8": partial(measure.tcp, 8),
    "udp64": partial(measure.udp, 64),
    "udp1400": partial(measure.udp, 1400),
    "rr": measure.request_response,
    "flood": measure.flood,
}

IDLE_LOOK_SECONDS = 2.0


class Session:
    """Whatever is in `samples` and `troubles` stands, also when `run` was interrupted."""

    def __init__(
        self, options: Options, tell: Callable[[str], None], step: Callable[[str, int], None]
    ) -> None:
        """`tell` gets a line for a person now and then; `step` gets what is under way and how many of
        `steps` are behind it."""
        self._options = options
        self._tell = tell
        self._step = step
        self._done = 0
        self.steps = len(options.wires) * len(options.systems) * len(options.measurements) * options.rounds
        self.samples: list[Sample] = []
        self.troubles: list[Trouble] = []
        self.busy_when_idle: dict[str, float] = {}
        """By wire: the share of the CPUs that was busy with every system up and nothing offered."""

        self.generator: dict[str, float] = {}
        """Datagrams a second that it sends if nothing is in its way."""

    def run(self) -> None:
        self._measure_generator()
        for wire in self._options.wires:
            with ExitStack() as stack:
                pairs = self._set_up(wire, stack)
                busy = measure.busy_share(IDLE_LOOK_SECONDS)
                self.busy_when_idle[wire] = round(busy, 3)
                if busy > 0.05:
                    self._tell(f"this machine is {busy:.0%} busy before anything is measured: expect spread")
                for number in range(self._options.rounds):
                    for name in self._options.measurements:
                        self._measure(wire, number, name, pairs)

    def _measure_generator(self) -> None:
        sizes = [int(name.removeprefix("udp")) for name in self._options.measurements if "udp" in name]
        if not sizes:
            return
        with Lab(f"compare-{os.getpid():x}-generator") as lab:
            for size in sizes:
                self.generator[f"udp{size}"] = round(measure.generator_limit(lab, size, 1.0))
        self._tell(f"the generator alone, datagrams a second: {self.generator}")

    def _set_up(self, wire: str, stack: ExitStack) -> dict[str, Pair]:
        pairs = {}
        for number, name in enumerate(self._options.systems):
            self._step(f"wire {wire}: setting up {name}", self._done)
            with ExitStack() as own:
                try:
                    pair = own.enter_context(SYSTEMS[name].join(f"compare-{os.getpid():x}-{number}", wire))
                    measure.wait_reachable(pair)
                    measure.fix_congestion_control(pair)
                except (LabError, OSError) as error:
                    self._trouble(wire, name, None, error)
                    self._done += len(self._options.measurements) * self._options.rounds
                    continue
                stack.enter_context(own.pop_all())
                pairs[name] = pair
        return pairs

    def _measure(self, wire: str, number: int, name: str, pairs: dict[str, Pair]) -> None:
        """One measurement of each system in turn, so that what is compared lies close together in time.
        Each round has an order of its own, the same in every run: none always comes after the same one."""
        measured: dict[str, measure.Values] = {}
        order = list(pairs.items())
        random.Random(number).shuffle(order)
        for system, pair in order:
            self._step(f"wire {wire}, round {number + 1}: {name} of {system}", self._done)
            try:
                values = MEASURE[name](pair, self._options.seconds)
            except (LabError, OSError) as error:
                self._trouble(wire, system, name, error)
            else:
                measured[system] = values
            self._done += 1
        said = []
        for system in pairs:
            if values := measured.get(system, {}):
                self.samples += [
                    Sample(wire, system, metric, number, value) for metric, value in values.items()
                ]
                said.append(f"{system} {next(iter(values.values())):.4g}")
        self._tell(f"wire {wire}, round {number + 1}, {name}: {', '.join(said)}")

    def _trouble(self, wire: str, system: str, metric: str | None, error: Exception) -> None:
        trouble = Trouble(wire, system, metric, str(error))
        if trouble not in self.troubles:
            self.troubles.append(trouble)
            self._tell(f"wire {wire}: {system} {metric or 'is absent'}: {error}")
