"""Our cut against the kernel's own, byte for byte, and what we merge against what the kernel makes of it.

A superframe is written to one TAP; a bridge, which changes nothing, hands it to another, which was opened
without offloads: so the kernel must cut it and finish every checksum before it can be read there.
"""

from __future__ import annotations

import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fastpath.offload.coalesce import merge
from fastpath.offload.segment import cut
from tests.assumptions.kernel import open_tap, set_offloads
from tests.netns_tools import Namespace
from tests.packets.transport import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    PSH,
    TCP,
    UDP,
    VIRTIO,
    Packet,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

MTU = 65_521  # the longest a TAP has
MAX_UDP_SEGMENTS = 64  # UDP_MAX_SEGMENTS before Linux 6.9
MAX_TCP_SEGMENTS = 500  # as many as the second TAP's queue holds, and then some
ENDS = {4: ("10.2.0.2", "10.1.0.2"), 6: ("fd00:2::2", "fd00:1::2")}
DEADLINE_SECONDS = 5


class KernelCut:
    """The way from one TAP to the other."""

    def __init__(self, namespace: Namespace, undo: ExitStack) -> None:
        for which in ("all", "default"):
            namespace.set_sysctl(f"net/ipv6/conf/{which}/disable_ipv6", "1")  # nothing of the kernel's own
        self.into, self.out_of = (open_tap(namespace.path, name) for name in ("into", "outof"))
        for tap in (self.into, self.out_of):
            undo.callback(os.close, tap)
        set_offloads(self.out_of, 0)
        namespace.ip("link", "add", "cut", "mtu", str(MTU), "type", "bridge", "mcast_snooping", "0")
        for name in ("into", "outof"):
            namespace.ip("link", "set", name, "mtu", str(MTU), "txqueuelen", "5000", "master", "cut", "up")
        namespace.ip("link", "set", "cut", "up")

    def __call__(self, virtio: bytes, frame: bytes, expected: int) -> list[bytes]:
        """The frames, complete, and whether or not there are as many as expected."""
        os.write(self.into, virtio + frame)
        frames: list[bytes] = []
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                read = os.read(self.out_of, 1 << 17)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if len(frames) >= expected or not select.select([self.out_of], [], [], left)[0]:
                    return frames
                continue
            assert (read[0] & 1, read[1]) == (0, 0), "neither a partial checksum nor a superframe"
            frames.append(read[10:])


@pytest.fixture
def kernel_cut(netns: Callable[[], Namespace]) -> Iterator[KernelCut]:
    with ExitStack() as undo:
        yield KernelCut(netns(), undo)


class Superframes:
    """Random ones, of every kind that a TAP may hand over."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = self.random.randbytes(1 << 17)

    def draw(self) -> tuple[Packet, int, dict[str, int]]:
        """The packet, its segments' size, and what else its virtio header says."""
        rng = self.random
        family, protocol = rng.choice((4, 6)), rng.choice((TCP, TCP, UDP))
        packet = Packet(
            *ENDS[family],
            protocol=protocol,
            tos=rng.randrange(256),
            ttl=rng.randrange(1, 256),
            flow_label=rng.randrange(1 << 20),
            identification=rng.choice((0, 0xFFFF, 0xFFF0, rng.randrange(1 << 16))),
            dont_fragment=rng.random() < 0.5,
            ip_options=b"\1" * 4 * rng.choice((0, 0, 0, 1, 10)) if family == 4 else b"",
            extensions=rng.choice(((), (), (), (DESTINATION_OPTIONS,), (0, DESTINATION_OPTIONS)))
            if family == 6
            else (),
            source_port=rng.randrange(1 << 16),
            destination_port=rng.randrange(1 << 16),
            sequence=rng.choice((0xFFFFFFFF, 0xFFFFF000, rng.randrange(1 << 32))),
            acknowledgement=rng.randrange(1 << 32),
            flags=rng.choice((ACK, ACK | PSH, ACK | CWR | ECE, rng.randrange(256))),
            reserved_bits=rng.choice((0, 0, 1, rng.randrange(16))),
            window=rng.randrange(1 << 16),
            urgent=rng.choice((0, rng.randrange(1 << 16))),
            tcp_options=rng.randbytes(4 * rng.choice((0, 3, 3, 5, 10))),
        )
        longest = MTU - packet.headers_length
        length = rng.choice((rng.randrange(1, 100), rng.randrange(1, 5_000), rng.randrange(1, longest)))
        segments = MAX_UDP_SEGMENTS if protocol == UDP else MAX_TCP_SEGMENTS
        size = rng.choice((1, 88, 536, 1_376, 1_398, 1_448, 8_900, rng.randrange(1, 65_000)))
        size = max(size, -(-length // segments))
        if (
            length <= size
        ):  # one segment: the kernel takes TCP's options for payload here, and drops it as odd
            size += len(packet.tcp_options)
        start = rng.randrange(len(self.pool) - length)
        lies = {}
        if protocol == TCP and packet.flags & CWR and rng.random() < 0.5:
            lies["gso_type"] = (GSO_TCPV4 if family == 4 else GSO_TCPV6) | GSO_ECN
        return packet.but(payload=self.pool[start : start + length]), size, lies


def count_of(slow: int, default: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "count", [default, pytest.param(slow, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
    )


@count_of(slow=500_000, default=5_000)
def test_our_cut_is_the_kernels(kernel_cut: KernelCut, count: int) -> None:
    superframes, segments = Superframes(seed=count), 0
    for number in range(count):
        packet, size, lies = superframes.draw()
        virtio, frame = packet.superframe(size, **lies)
        ours = cut(virtio, frame)
        assert isinstance(ours, list), (number, packet, size)
        expected = ours if len(ours) > 1 else [mangled(packet, ours[0])]
        assert kernel_cut(virtio, frame, len(ours)) == expected, (number, packet, size)
        segments += len(ours)
    assert segments > 5 * count  # most of them were superframes indeed


def mangled(packet: Packet, frame: bytes) -> bytes:
    """What is no superframe the kernel completes in skb_checksum_help(), which writes all ones for a sum of
    zero whatever the protocol; cutting, it does so for UDP only (RFC 768). Receivers take both."""
    at = 14 + packet.ip_header_length + (6 if packet.protocol == UDP else 16)
    return (
        frame[:at] + (b"\xff\xff" if frame[at : at + 2] == b"\0\0" else frame[at : at + 2]) + frame[at + 2 :]
    )


@count_of(slow=500_000, default=5_000)
def test_the_kernel_takes_what_we_merge_and_makes_of_it_what_came(kernel_cut: KernelCut, count: int) -> None:
    """A train is cut by us, merged by us, and cut again by the kernel: it is the train."""
    superframes, merged = Superframes(seed=count + 1), 0
    for number in range(count):
        packet, size, _ = superframes.draw()
        packet = packet.but(flags=packet.flags & (PSH | ECE) | ACK, ip_options=b"", extensions=())
        frames = cut(*packet.superframe(size))
        assert isinstance(frames, list)
        again = []
        for virtio, frame in merge(frames):
            segments = segments_in(virtio, frame)
            again += kernel_cut(virtio, frame, segments)
            merged += segments > 1
        assert again == frames, (number, packet, size)
    assert merged > count / 2


def segments_in(virtio: bytes, frame: bytes) -> int:
    """How many packets a frame stands for, by its header's own word."""
    _, gso_type, headers, size, _, _ = VIRTIO.unpack(virtio)
    return -(-(len(frame) - headers) // size) if gso_type else 1
