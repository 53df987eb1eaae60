"""The resolver: what one query costs it, and what a client on the loopback gets out of the whole process.

A query's cost is why it has a process of its own: that many microseconds are ten times a small packet's way.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from threading import Event, Thread

import dns.message
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import PerPacket
from forwarder.names.limits import Limiter
from forwarder.names.records import Replace, Service
from forwarder.names.resolver import Resolver
from forwarder.names.service import NameService
from forwarder.names.settings import Settings
from forwarder.names.upstream import Upstream
from forwarder.names.zone import Zone

SERVICES = 1_000
QUERIES = 1_000
IN_FLIGHT = 32
ROUNDS = 5

RECORDS = tuple(
    Service(f"service-{number}", cluster_ips=(ip_address("10.43.0.0") + number,))
    for number in range(SERVICES)
)


def query(name: str) -> bytes:
    return dns.message.make_query(
        f"{name}.default.svc.cluster.local", "A", use_edns=0, payload=1232
    ).to_wire()


FOUND = [query(f"service-{number % SERVICES}") for number in range(QUERIES)]
ABSENT = [query(f"absent-{number}") for number in range(QUERIES)]


@pytest.mark.benchmark(group="names: one query")
@pytest.mark.parametrize("queries", [FOUND, ABSENT], ids=["found", "absent"])
def test_a_query_read_and_answered(per_packet: PerPacket, queries: list[bytes]) -> None:
    resolver = make_resolver()

    def answer() -> bytes:
        resolver.forget_repeats()
        for data in queries:
            reply = resolver.receive(data, "127.0.0.1", 0.0, over_tcp=False)
        assert isinstance(reply, bytes)
        return reply

    reply = per_packet(answer, packets=len(queries))
    assert dns.message.from_wire(queries[-1]).is_response(dns.message.from_wire(reply))
    assert resolver.counters["repeated"] == 0


@pytest.mark.benchmark(group="names: one query")
def test_the_same_query_within_a_second(per_packet: PerPacket) -> None:
    resolver = make_resolver()

    def answer() -> None:
        for _ in range(QUERIES):
            resolver.receive(FOUND[0], "127.0.0.1", 0.0, over_tcp=False)

    per_packet(answer, packets=QUERIES)
    assert resolver.counters["repeated"] == resolver.counters["received"] - 1


@pytest.mark.benchmark(group="names: a change")
def test_one_service_of_a_thousand_changes(benchmark: BenchmarkFixture) -> None:
    zone = make_resolver().zone
    states = itertools.cycle(
        Replace((*RECORDS[:-1], Service("changed", cluster_ips=(ip_address(f"10.44.0.{number}"),))))
        for number in (1, 2)
    )
    benchmark(lambda: zone.apply("bench", next(states)))


@pytest.mark.benchmark(group="names: the process")
@pytest.mark.parametrize("names", ["different", "repeated"])
def test_queries_a_second(benchmark: BenchmarkFixture, names: str) -> None:
    """One client keeps IN_FLIGHT queries under way."""
    seconds: list[float] = []
    absent = ([query(f"{turn}-{number}") for number in range(QUERIES)] for turn in itertools.count())
    with running() as port:
        client = Client(port)
        client.ask(FOUND)
        benchmark.pedantic(
            lambda queries: seconds.extend(client.ask(queries)),
            setup=lambda: ((next(absent) if names == "different" else FOUND,), {}),
            rounds=ROUNDS,
        )
        client.close()
    assert len(seconds) == ROUNDS * QUERIES
    seconds.sort()
    extra = benchmark.extra_info
    extra["p50_us"] = round(seconds[len(seconds) // 2] * 1e6)
    extra["p99_us"] = round(seconds[len(seconds) * 99 // 100] * 1e6)
    if benchmark.stats is not None:
        extra["queries_per_second"] = round(QUERIES / benchmark.stats.stats.median)
    print(f"\n{benchmark.name}: {dict(extra)}")


class Client:
    """Asks over one socket, with a window of queries under way."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(5)
        self._socket.connect(("127.0.0.1", port))

    def close(self) -> None:
        self._socket.close()

    def ask(self, queries: list[bytes]) -> list[float]:
        """How long each took, in seconds."""
        waiting: dict[int, float] = {}
        taken = []
        idents = iter(range(len(queries)))
        for ident in itertools.islice(idents, IN_FLIGHT):
            self._send(queries, ident, waiting)
        while waiting:
            reply = self._socket.recv(4096)
            taken.append(time.perf_counter() - waiting.pop(int.from_bytes(reply[:2], "big")))
            ident = next(idents, -1)
            if ident >= 0:
                self._send(queries, ident, waiting)
        return taken

    def _send(self, queries: list[bytes], ident: int, waiting: dict[int, float]) -> None:
        waiting[ident] = time.perf_counter()
        self._socket.send(ident.to_bytes(2, "big") + queries[ident][2:])


def make_resolver() -> Resolver:
    zone = Zone("cluster.local", (ip_address("127.0.0.1"),))
    assert zone.apply("bench", Replace(RECORDS)) == []
    limiter = Limiter((ip_network("127.0.0.0/8"),), 1e9)
    return Resolver(zone, limiter, Upstream(tuple), 8 << 20, lambda: 0.0)


@contextmanager
def running() -> Iterator[int]:
    """The resolver's process, as the daemon runs it; its port on the loopback."""
    ready, done = Event(), Event()
    ports: list[int] = []

    async def keep() -> None:
        service = NameService(
            Settings(
                domain="cluster.local",
                addresses=("127.0.0.1",),
                networks=(),
                clients=("127.0.0.0/8",),
                upstream=("127.0.0.1:9",),
                queries_per_second=1_000_000,
                cache_bytes=8 << 20,
            ),
            port=0,
        )
        service.apply("bench", Replace(RECORDS))
        await service.start()
        ports.append(service.port)
        ready.set()
        await asyncio.to_thread(done.wait)
        await service.close()

    thread = Thread(target=asyncio.run, args=(keep(),))
    thread.start()
    try:
        assert ready.wait(10), "the resolver did not start"
        yield ports[0]
    finally:
        done.set()
        thread.join()
