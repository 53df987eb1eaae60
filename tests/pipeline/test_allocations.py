"""A packet costs no allocation, of C or of Python: counted over a million packets.

The pumps run in a process of their own, in which every request for memory is counted, those for Python's
small objects too. A call from Python makes a few by itself, so a call that moves a batch is held against one
that finds nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from tests.packets.transport import TCP, UDP, Packet
from tests.pipeline.harness import Node, gateway_mac, join, pod, router_mac, wait_readable

ROOT = Path(__file__).resolve().parents[2]

COUNTER = r"""
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

unsigned long podloom_allocations;
#define COUNTED(call) (__atomic_fetch_add(&podloom_allocations, 1, __ATOMIC_RELAXED), call)

void *malloc(size_t size) { return COUNTED(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return COUNTED(__libc_calloc(count, size)); }
void *realloc(void *block, size_t size) { return COUNTED(__libc_realloc(block, size)); }
void *memalign(size_t step, size_t size) { return COUNTED(__libc_memalign(step, size)); }
void *aligned_alloc(size_t step, size_t size) { return COUNTED(__libc_memalign(step, size)); }
int posix_memalign(void **block, size_t step, size_t size)
{
    *block = COUNTED(__libc_memalign(step, size));
    return *block ? 0 : ENOMEM;
}
"""

SEGMENTS, SIZE, SUPERFRAMES = 40, 1_300, 2
FRAMES = 64
OFFLOADS = ("udp_segment", "merge_tcp", "merge_udp")
WARM_UP = 50  # turns in which Python fills its own free lists


def messages(near: Node, traffic: str) -> tuple[list[bytes], int]:
    """What the pods send at once, and how many packets that is."""
    ethernet = router_mac(1) + gateway_mac(1)
    packet = Packet(pod(1, 4), pod(2, 4), protocol=UDP if "UDP" in traffic else TCP, ethernet=ethernet)
    if traffic.startswith("superframes"):
        virtio, frame = packet.but(payload=bytes(SEGMENTS * SIZE)).superframe(SIZE)
        return [virtio.ljust(near.vnet_header_size, b"\0") + frame] * SUPERFRAMES, SEGMENTS * SUPERFRAMES
    flows = [packet.but(source_port=40_000 + i % 4, payload=bytes(22)).frame() for i in range(FRAMES)]
    return [near.virtio() + frame for frame in flows], FRAMES


class Counter:
    """How often memory was asked for while something ran."""

    def __init__(self) -> None:
        self._requests = ctypes.c_ulong.in_dll(ctypes.CDLL(None), "podloom_allocations")

    def during(self, run: Callable[[], object]) -> int:
        before = self._requests.value
        run()
        return self._requests.value - before


@dataclass
class Turns:
    """Requests for memory of each call, in each turn: sets, since all should be alike."""

    encap: set[int] = field(default_factory=set)
    idle_encap: set[int] = field(default_factory=set)
    decap: set[int] = field(default_factory=set)
    idle_decap: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Count:
    """What the process tells."""

    encap: list[int]
    idle_encap: list[int]
    decap: list[int]
    idle_decap: list[int]
    encap_packets: int
    decap_packets: int
    nothing: int
    one_block: int
    """Of a call that does nothing, and of one that takes a block."""


def move(traffic: str, packets: int) -> Count:
    """Move so many packets from one node's pods to another's and count."""
    counter = Counter()
    with closing(Node(1, 4, senders=2)) as near, closing(Node(2, 4)) as far:
        join(near, far, "geneve")
        for node in (near, far):
            for name in OFFLOADS:
                node.pump.set_offload(name, traffic.startswith("superframes"))
        batch, each = messages(near, traffic)
        receiver = far.receivers["geneve"]
        buffer = bytearray(1 << 17)

        def decap() -> None:
            far.pump.decap(receiver)

        def turn(turns: Turns) -> None:
            for message in batch:
                near.tap.send(message)
            turns.encap.add(counter.during(near.pump.encap))
            turns.idle_encap.add(counter.during(near.pump.encap))
            wait_readable(receiver)
            turns.decap.add(counter.during(decap))
            while far.pump.decap(receiver):
                pass
            turns.idle_decap.add(counter.during(decap))
            with suppress(BlockingIOError):
                while True:
                    far.tap.recv_into(buffer)

        for _ in range(WARM_UP):
            turn(Turns())
        turns = Turns()
        for _ in range(-(-packets // each)):
            turn(turns)
        return Count(
            encap=sorted(turns.encap),
            idle_encap=sorted(turns.idle_encap),
            decap=sorted(turns.decap),
            idle_decap=sorted(turns.idle_decap),
            encap_packets=near.forwarded("encap"),
            decap_packets=far.forwarded("decap"),
            nothing=counter.during(lambda: None),
            one_block=counter.during(lambda: bytes(5_000)),
        )


def move_in_a_process(directory: Path, traffic: str, packets: int) -> Count:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: whether a packet costs an allocation is NOT tested in this run")
    library = directory / "allocations.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=COUNTER, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.test_allocations", traffic, str(packets)],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Count(**json.loads(done.stdout))


@pytest.mark.parametrize(
    ("traffic", "packets"),
    [
        ("superframes of TCP", 1_000_000),
        ("superframes of UDP", 1_000_000),
        ("small frames, no offload", 100_000),
        pytest.param("small frames, no offload", 1_000_000, marks=pytest.mark.slow),
    ],
)
def test_a_packet_costs_no_allocation(tmp_path: Path, traffic: str, packets: int) -> None:
    """Every call asks for the same, whether it moved a batch or nothing."""
    count = move_in_a_process(tmp_path, traffic, packets)
    assert count.one_block == count.nothing + 1, "the counter does not count"
    assert count.encap_packets >= packets
    assert count.decap_packets >= packets
    assert count.encap == count.idle_encap
    assert count.decap == count.idle_decap
    assert len(count.encap) == len(count.decap) == 1


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(move(sys.argv[1], int(sys.argv[2])))))
