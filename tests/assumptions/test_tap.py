"""What a TAP descriptor does with frames and their virtio headers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forwarder.demo.lab import link_index, netlink
from tests.assumptions.conftest import Namespace
from tests.assumptions.kernel import (
    GSO_NONE,
    NEEDS_CSUM,
    NUD_PERMANENT,
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUN_F_USO4,
    TUN_F_USO6,
    UDP_SEGMENT,
    VIRTIO_HEADER,
    disable_ipv6,
    link_address,
    open_tap,
    read_frames,
    set_offloads,
    set_up,
    set_vnet_header_size,
    udp_socket,
)
from tests.packets import build
from tests.reference.checksum import transport_is_valid

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

HERE, THERE = "10.0.0.1", "10.0.0.2"
THERE_MAC = "02:00:00:00:00:02"
NO_HEADER = VIRTIO_HEADER.pack(0, GSO_NONE, 0, 0, 0, 0)


@contextmanager
def tap_with_neighbour(namespace: Path, header_size: int = 10) -> Iterator[int]:
    """A TAP that is up, has HERE, and knows where THERE is."""
    disable_ipv6(namespace)
    tap = open_tap(namespace)
    try:
        set_vnet_header_size(tap, header_size)
        set_up(namespace, "tap", HERE, 24)
        with netlink(namespace) as ip:
            index = link_index(ip, "tap")
            ip.neigh("add", dst=THERE, lladdr=THERE_MAC, ifindex=index, state=NUD_PERMANENT)
        yield tap
    finally:
        os.close(tap)


def frame_for(namespace: Path, payload: bytes, port: int) -> bytes:
    ethernet = build.mac(link_address(namespace, "tap")) + build.mac(THERE_MAC) + b"\x08\x00"
    return ethernet + build.udp(THERE, HERE, payload, dport=port)


@pytest.mark.parametrize("header_size", [10, 12])
def test_one_read_is_one_frame_behind_a_header_of_the_size_set(
    namespace: Namespace, header_size: int
) -> None:
    """TUNSETVNETHDRSZ 10 and 12 are both accepted, and the frame begins right behind the header."""
    node = namespace()
    with tap_with_neighbour(node, header_size) as tap, udp_socket(node, HERE) as sender:
        for payload in (b"first", b"second"):
            sender.sendto(payload, (THERE, 9))
        frames = read_frames(tap, 2)
    assert [frame[header_size : header_size + 6] for frame in frames] == [build.mac(THERE_MAC)] * 2
    assert [frame[header_size + 42 :] for frame in frames] == [b"first", b"second"]


def test_readv_scatters_header_and_frame(namespace: Namespace) -> None:
    """The pump reads the header into one buffer and the frame into another, with headroom before it."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        sender.sendto(b"payload", (THERE, 9))
        header, frame = bytearray(10), bytearray(2048)
        assert os.readv(tap, [header, frame]) == 10 + 14 + 20 + 8 + 7
    assert bytes(frame[:6]) == build.mac(THERE_MAC)


def test_a_short_buffer_truncates_and_the_rest_is_lost(namespace: Namespace) -> None:
    """So a buffer must hold the largest frame; nothing tells that one was cut."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        sender.sendto(bytes(100), (THERE, 9))
        sender.sendto(b"next", (THERE, 9))
        assert len(os.read(tap, 50)) == 50
        assert os.read(tap, 2048)[52:] == b"next"


def test_an_empty_tap_says_try_again(namespace: Namespace) -> None:
    """A batch ends at EAGAIN."""
    with tap_with_neighbour(namespace()) as tap, pytest.raises(BlockingIOError):
        os.read(tap, 2048)


def test_writev_gathers_one_frame(namespace: Namespace) -> None:
    """Decap writes header and frame from different buffers in one call, and it arrives as one frame."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as receiver:
        frame = frame_for(node, b"gathered", receiver.getsockname()[1])
        assert os.writev(tap, [NO_HEADER, frame[:14], frame[14:]]) == len(NO_HEADER) + len(frame)
        assert receiver.recv(100) == b"gathered"


@pytest.mark.parametrize("length", [0, 9, 10, 10 + 13])
def test_less_than_header_and_ethernet_is_refused(namespace: Namespace, length: int) -> None:
    """EINVAL is counted as one frame not delivered; it must not end the batch."""
    with tap_with_neighbour(namespace()) as tap, pytest.raises(OSError, match="Invalid argument"):
        os.write(tap, bytes(length))


def test_a_header_that_points_behind_its_frame_is_refused(namespace: Namespace) -> None:
    """The kernel checks csum_start and csum_offset against the frame: a mistake of ours is no overrun."""
    node = namespace()
    with tap_with_neighbour(node) as tap:
        frame = frame_for(node, b"payload", 9)
        header = VIRTIO_HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, len(frame), 6)
        with pytest.raises(OSError, match="Invalid argument"):
            os.write(tap, header + frame)


def test_a_tap_that_is_down_refuses_writes(namespace: Namespace) -> None:
    """EIO: somebody set the link down. Nothing to end a daemon for."""
    tap = open_tap(namespace())
    try:
        with pytest.raises(OSError, match="Input/output error"):
            os.write(tap, NO_HEADER + bytes(60))
    finally:
        os.close(tap)


def test_a_partial_checksum_that_is_written_is_trusted(namespace: Namespace) -> None:
    """NEEDS_CSUM makes the stack take the frame without summing it. So only what was verified before may
    be marked so, or a corrupt frame would be laundered."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as receiver:
        frame = bytearray(frame_for(node, b"unsummed", receiver.getsockname()[1]))
        frame[40:42] = b"\x12\x34"
        header = VIRTIO_HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 34, 6)
        os.write(tap, header + frame)
        assert receiver.recv(100) == b"unsummed"


def test_a_wrong_checksum_without_the_flag_is_dropped(namespace: Namespace) -> None:
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as receiver:
        port = receiver.getsockname()[1]
        wrong = bytearray(frame_for(node, b"wrong", port))
        wrong[40:42] = b"\x12\x34"
        os.write(tap, NO_HEADER + wrong)
        os.write(tap, NO_HEADER + frame_for(node, b"right", port))
        assert receiver.recv(100) == b"right"


def test_with_the_checksum_offload_frames_arrive_unfinished(namespace: Namespace) -> None:
    """TUN_F_CSUM: local frames carry NEEDS_CSUM and the pseudo-header's sum only. csum_start counts from
    the Ethernet header."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        set_offloads(tap, TUN_F_CSUM)
        sender.sendto(b"payload", (THERE, 9))
        (read,) = read_frames(tap, 1)
    flags, gso_type, _, _, start, offset = VIRTIO_HEADER.unpack_from(read)
    assert (flags, gso_type, start, offset) == (NEEDS_CSUM, GSO_NONE, 34, 6)
    assert not transport_is_valid(read[24:])


def test_without_offloads_the_kernel_finishes_frames(namespace: Namespace) -> None:
    """TUNSETOFFLOAD 0 is what a fresh TAP has: no NEEDS_CSUM, the checksum is right."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        set_offloads(tap, 0)
        sender.sendto(b"payload", (THERE, 9))
        (read,) = read_frames(tap, 1)
    assert read[:10] == NO_HEADER
    assert transport_is_valid(read[24:])


def test_without_segmentation_offload_the_kernel_cuts_superframes(namespace: Namespace) -> None:
    """With the TSO and USO bits off every frame fits the MTU, whatever the pod's own device can do."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        set_offloads(tap, TUN_F_CSUM)
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sender.sendto(bytes(3500), (THERE, 9))
        frames = read_frames(tap, 4)
    assert [len(frame) - 10 - 42 for frame in frames] == [1000, 1000, 1000, 500]
    assert {VIRTIO_HEADER.unpack_from(frame)[1] for frame in frames} == {GSO_NONE}


def test_with_uso_a_superframe_arrives_whole(namespace: Namespace) -> None:
    """USO4 and USO6 are accepted together with the TSO bits (6.2), and one read brings all segments."""
    node = namespace()
    with tap_with_neighbour(node) as tap, udp_socket(node, HERE) as sender:
        set_offloads(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6)
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sender.sendto(bytes(3500), (THERE, 9))
        (read,) = read_frames(tap, 1)
    _, gso_type, _, gso_size, _, _ = VIRTIO_HEADER.unpack_from(read)
    assert (gso_type, gso_size, len(read)) == (5, 1000, 10 + 42 + 3500)  # VIRTIO_NET_HDR_GSO_UDP_L4
