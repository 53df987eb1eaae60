"""A process in which the kernel refuses what it is told to: what test_refusals.py runs its pumps in.

The process is spawned with refusals.c preloaded; nothing of the product knows. What goes in and comes out is
plain data, so a case is written, and judged, where the tests are.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.packets import build
from tests.pipeline.harness import POD_MTU, VNI, Node, Wire, wire_address

ANY, WHOLE, PLAIN = range(3)
ALWAYS = -1
UPLINK_MAC = b"\2\0\0\0\3\1"
TUNNEL_HEADER = 8
VIRTIO = 10

Result = TypeVar("Result")
Run = Callable[..., Any]


@dataclass(frozen=True)
class Refusal:
    """Attempts `first` to `first + times` of a kind are refused. Of sends, WHOLE are those that UDP_SEGMENT
    cuts; of writes, superframes; PLAIN are the others."""

    error: int
    which: int = ANY
    first: int = 0
    times: int = ALWAYS


@dataclass(frozen=True)
class Batch:
    """What one call of the pump finds: (virtio header, frame) from the pods, or frames from the wire."""

    messages: list[Any]
    sends: list[Refusal] = field(default_factory=list)
    writes: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of one batch."""

    delivered: list[Any]
    """encap: frames that came over the wire. decap: (virtio header, frame) that reached the TAP."""
    uplink: list[bytes]
    forwarded: int
    forwarded_bytes: int
    dropped: dict[str, int]
    offloads: dict[str, bool]
    attempts: int
    """Sends or writes that the batch took, refused ones among them."""


@contextmanager
def process(directory: Path) -> Iterator[ProcessPoolExecutor]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: what happens when the kernel refuses is NOT tested in this run")
    library = directory / "refusals.so"
    source = Path(__file__).with_suffix("").with_name("refusals.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([compiler, *flags, str(source), "-ldl"], check=True)
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("LD_PRELOAD", str(library), prepend=" ")
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        assert pool.submit(is_preloaded, str(library)).result()
        yield pool


def is_preloaded(library: str) -> bool:
    return library in Path("/proc/self/maps").read_text()


# In the process -----------------------------------------------------------------------------------------


def encap(*batches: Batch, senders: int = 1, uplink: bool = False) -> list[Outcome]:
    with ExitStack() as stack:
        node = stack.enter_context(closing(Node(1, 4, senders=senders)))
        wire = stack.enter_context(closing(Wire(wire_address(2, 4))))
        node.add_peer(1, 2, wire.port)
        far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (far, near):
            stack.enter_context(end).setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        if uplink:
            node.pump.set_uplink(near.fileno(), UPLINK_MAC)

        def move(batch: Batch) -> list[Any]:
            for virtio, frame in batch.messages:
                node.pods_send(frame, virtio)
            assert node.pump.encap() == len(batch.messages)
            return [datagram.payload[TUNNEL_HEADER:] for datagram in wire.get_now()]

        return [outcome(node, "encap", batch, move, far) for batch in batches]


def decap(*batches: Batch) -> list[Outcome]:
    with closing(Node(1, 4, mtu=POD_MTU)) as node, closing(Wire(wire_address(2, 4))) as wire:
        node.add_peer(1, 2, wire.port)
        for name in ("merge_tcp", "merge_udp"):
            node.pump.set_offload(name, True)

        def move(batch: Batch) -> list[Any]:
            for frame in batch.messages:
                wire.send(build.geneve(VNI) + frame, node.address, node.port("geneve"))
            node.decap("geneve", len(batch.messages))
            return [(message[:VIRTIO], message[VIRTIO:]) for message in received(node.tap)]

        return [outcome(node, "decap", batch, move) for batch in batches]


def outcome(
    node: Node,
    direction: str,
    batch: Batch,
    move: Callable[[Batch], list[Any]],
    uplink: socket.socket | None = None,
) -> Outcome:
    library = ctypes.CDLL(None)
    attempts = library.send_attempts if direction == "encap" else library.write_attempts
    attempts.restype = ctypes.c_long
    library.refuse_nothing()
    for refuse, refusals in ((library.refuse_sends, batch.sends), (library.refuse_writes, batch.writes)):
        for refusal in refusals:
            limits = ctypes.c_long(refusal.first), ctypes.c_long(refusal.times)
            refuse(refusal.error, refusal.which, *limits)
    before, dropped = node.pump.counters()[direction], node.dropped(direction)
    delivered = move(batch)
    after = node.pump.counters()[direction]
    node.assert_counters_close()
    peer = node.peers.counters(1)
    assert peer[f"{direction}_packets"] == after["forwarded"]
    assert peer[f"{direction}_bytes"] == after["forwarded_bytes"]
    return Outcome(
        delivered,
        [] if uplink is None else received(uplink),
        after["forwarded"] - before["forwarded"],
        after["forwarded_bytes"] - before["forwarded_bytes"],
        {
            reason: count - dropped.get(reason, 0)
            for reason, count in node.dropped(direction).items()
            if count > dropped.get(reason, 0)
        },
        node.pump.offloads,
        attempts(),
    )


def received(sock: socket.socket) -> list[bytes]:
    messages = []
    while True:
        try:
            messages.append(sock.recv(1 << 17))
        except BlockingIOError:
            return messages
