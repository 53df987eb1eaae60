"""One measurement of one system: TCP by iperf3, UDP and round trips by load.pyx. All are bounded in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from bench.compare import load
from bench.compare.pods import Pair, ip, run, start
from forwarder.demo import netns
from forwarder.demo.lab import Lab, LabError

ALLOWED_LOSS = 0.01
SEARCH_STEPS = 6
DRAIN_SECONDS = 0.1
REACHABLE_SECONDS = 15.0
PING_BYTES = 64  # as ping sends: 56 bytes behind the ICMP header
REQUEST_BYTES = 64
WARM_UP_SECONDS = 1.0
"""Before TCP is measured: slow start is over then, and a virtual machine's CPUs have come to rest."""

CONGESTION_CONTROL = "cubic"
"""Linux's own default, whatever this machine's is, so that figures of two machines compare."""

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_RECEIVE_BUFFER_BYTES = 16 << 20
_SOL_RAW, _ICMP_FILTER, _ICMP_ECHO_REPLY = 255, 1, 0  # linux/in.h, linux/icmp.h

Values = dict[str, float]
"""By metric, in the units of report.METRICS."""


def fix_congestion_control(pair: Pair) -> None:
    """Let both pods' connections be CONGESTION_CONTROL's from their first packet, by their default routes:
    one that iperf3 switches after connecting is still paced if it began with BBR."""
    for namespace in (pair.client, pair.server):
        for route in run(namespace, "ip", "-4", "route", "show", "default").splitlines():
            ip(namespace, f"route change {route} congctl {CONGESTION_CONTROL}")


def wait_reachable(pair: Pair) -> None:
    """LabError if the pods cannot ping each other in time."""
    deadline = time.monotonic() + REACHABLE_SECONDS
    with closing(_open_ping(pair)) as ping:
        while load.ask(ping.fileno(), PING_BYTES, True, 0.05)[0] == 0:
            if time.monotonic() > deadline:
                raise LabError(f"no ping came back in {REACHABLE_SECONDS:.0f} s")


def tcp(streams: int, pair: Pair, seconds: float) -> Values:
    """Payload received, and what it cost this machine and the system's own processes."""
    with ExitStack() as stack:
        server = start(
            stack,
            pair.server,
            "iperf3",
            "-s",
            "-1",
            "--forceflush",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert server.stdout is not None
        stack.enter_context(server.stdout)
        while b"Server listening" not in (line := server.stdout.readline()):
            if not line:
                raise LabError("iperf3 -s ended before it listened")
        before = _Cpu.now(pair.forwarders)
        output = run(
            pair.client,
            *("iperf3", "-c", pair.address, "-P", str(streams), "-J"),
            *("-t", f"{seconds:.0f}", "-O", f"{WARM_UP_SECONDS:.0f}"),
            seconds=seconds + WARM_UP_SECONDS + 20,
        )
        spent = _Cpu.now(pair.forwarders) - before
    said = json.loads(output)
    end = said["end"]
    # Of the warm-up as well: its CPU seconds are counted too.
    gigabytes = sum(interval["sum"]["bytes"] for interval in said["intervals"]) / 1e9
    if end["sum_received"]["bytes"] == 0:
        raise LabError("iperf3 moved nothing")
    values = {
        "": end["sum_received"]["bits_per_second"] / 1e9,
        "_retransmits": end["sum_sent"]["retransmits"],
        "_cpu_all": spent.everything / gigabytes,
    }
    if pair.forwarders:
        values["_cpu_own"] = spent.forwarders / gigabytes
    return {f"tcp{streams}{metric}": value for metric, value in values.items()}


def udp(size: int, pair: Pair, seconds: float) -> Values:
    """The most datagrams a second that arrive with less than ALLOWED_LOSS: found by halving, since a system
    that is offered too much delivers less than it could. `_offered` is the most the generator managed."""
    with ExitStack() as stack:
        receiver = stack.enter_context(netns.open_socket(pair.server, socket.AF_INET, socket.SOCK_DGRAM))
        receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        receiver.bind((pair.address, 0))
        sender = stack.enter_context(netns.open_socket(pair.client, socket.AF_INET, socket.SOCK_DGRAM))
        sender.connect(receiver.getsockname())
        pool = stack.enter_context(ThreadPoolExecutor(1))

        def offer(rate: float) -> Trial:
            return _trial(pool, sender, receiver, size, rate, seconds / 4)

        flat_out = offer(0)
        delivered = flat_out.delivered if flat_out.loss < ALLOWED_LOSS else _search(offer, flat_out)
    return {f"udp{size}": delivered, f"udp{size}_offered": flat_out.offered}


def generator_limit(lab: Lab, size: int, seconds: float) -> float:
    """Datagrams a second that the generator sends over a veth pair to nobody: they have a MAC address that is
    not there, and are dropped where they arrive."""
    namespace = lab.add_namespace(f"sink{size}")
    ip(
        namespace,
        """link add sink type veth peer name drain
           link set sink up
           link set drain up
           address add 192.0.2.1/24 dev sink
           neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev sink nud permanent""",
    )
    with closing(netns.open_socket(namespace, socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.connect(("192.0.2.2", 9))
        sent, took = load.offer(sender.fileno(), size, 0, seconds)
    return sent / took


@dataclass(frozen=True)
class Trial:
    """Rates in datagrams a second."""

    offered: float
    delivered: float

    @property
    def loss(self) -> float:
        return 1 - self.delivered / self.offered if self.offered else 0.0


def _search(offer: Callable[[float], Trial], flat_out: Trial) -> float:
    low, high = 0.0, flat_out.offered
    best = 0.0
    rate = flat_out.delivered
    for _ in range(SEARCH_STEPS):
        # A machine that is not alone loses some now and then: only what fails twice is too much.
        for _ in range(2):
            trial = offer(rate)
            if trial.loss < ALLOWED_LOSS:
                break
        if trial.loss < ALLOWED_LOSS:
            low, best = rate, max(best, trial.delivered)
        else:
            high = rate
        rate = (low + high) / 2
    return best


def _trial(
    pool: ThreadPoolExecutor,
    sender: socket.socket,
    receiver: socket.socket,
    size: int,
    rate: float,
    seconds: float,
) -> Trial:
    stop = os.eventfd(0)
    try:
        counting = pool.submit(load.count, receiver.fileno(), stop, DRAIN_SECONDS, seconds + 5)
        try:
            sent, took = load.offer(sender.fileno(), size, rate, seconds)
        finally:
            os.eventfd_write(stop, 1)
            received = counting.result()
    finally:
        os.close(stop)
    return Trial(sent / took, received / took)


def request_response(pair: Pair, seconds: float) -> Values:
    """One UDP request after the other, answered by a process."""
    with ExitStack() as stack:
        server = stack.enter_context(netns.open_socket(pair.server, socket.AF_INET, socket.SOCK_DGRAM))
        server.bind((pair.address, 0))
        client = stack.enter_context(netns.open_socket(pair.client, socket.AF_INET, socket.SOCK_DGRAM))
        client.connect(server.getsockname())
        pool = stack.enter_context(ThreadPoolExecutor(1))
        echoing = pool.submit(load.echo, server.fileno(), seconds + 5)
        try:
            answers, _, p50, p99 = load.ask(client.fileno(), REQUEST_BYTES, False, seconds / 3)
        finally:
            client.send(b"x")
            echoing.result()
    return _round_trips("rr", answers, p50, p99)


def flood(pair: Pair, seconds: float) -> Values:
    """One ICMP echo after the other, answered by the far pod's kernel: what `ping -f` does."""
    with closing(_open_ping(pair)) as ping:
        answers, _, p50, p99 = load.ask(ping.fileno(), PING_BYTES, True, seconds / 3)
    return _round_trips("flood", answers, p50, p99)


def _round_trips(name: str, answers: int, p50: float, p99: float) -> Values:
    if answers == 0:
        raise LabError("no answer came back")
    return {f"{name}_p50": p50 * 1e6, f"{name}_p99": p99 * 1e6}


def _open_ping(pair: Pair) -> socket.socket:
    ping = netns.open_socket(pair.client, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    only_replies = ~(1 << _ICMP_ECHO_REPLY) & 0xFFFFFFFF
    ping.setsockopt(_SOL_RAW, _ICMP_FILTER, only_replies.to_bytes(4, "little"))
    ping.connect((pair.address, 0))
    return ping


@dataclass(frozen=True)
class _Cpu:
    """CPU seconds: of this machine, interrupts among them, and of some processes."""

    everything: float
    forwarders: float

    @classmethod
    def now(cls, pids: tuple[int, ...]) -> _Cpu:
        ticks = os.sysconf("SC_CLK_TCK")
        # proc(5): user nice system idle iowait irq softirq steal
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        own = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])  # utime, stime
        return cls((user + nice + system + irq + softirq) / ticks, own / ticks)

    def __sub__(self, earlier: _Cpu) -> _Cpu:
        return _Cpu(self.everything - earlier.everything, self.forwarders - earlier.forwarders)


def busy_share(seconds: float) -> float:
    """How much of this machine's CPUs is at work, from 0 to 1, over so long a look."""
    before = _Cpu.now(())
    time.sleep(seconds)
    return (_Cpu.now(()) - before).everything / seconds / (os.cpu_count() or 1)
