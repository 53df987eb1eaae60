"""What UDP sockets do with segments, ToS and oversize datagrams between two namespaces."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.assumptions.conftest import Namespace
from tests.assumptions.kernel import (
    IP_MTU_DISCOVER,
    IPV6_MTU_DISCOVER,
    PMTUDISC_DO,
    SO_NO_CHECK,
    UDP_GRO,
    UDP_SEGMENT,
    udp_socket,
    veth,
)

pytestmark = pytest.mark.root

ADDRESSES = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
BOTH = pytest.mark.parametrize("version", [4, 6])
PAYLOAD = {4: 1472, 6: 1452}
"""Bytes of UDP payload that fit an MTU of 1500."""


@contextmanager
def sockets(namespace: Namespace, version: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A sender and the receiver it is connected to, in two namespaces joined by a veth pair."""
    one, other = namespace(), namespace()
    veth(one, other, ADDRESSES[version], 24 if version == 4 else 64)
    here, there = ADDRESSES[version]
    with udp_socket(one, here) as sender, udp_socket(other, there) as receiver:
        sender.connect(receiver.getsockname())
        yield sender, receiver


def refuse_fragments(sender: socket.socket) -> None:
    if sender.family == socket.AF_INET:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
    else:
        sender.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)


def send_segments(sender: socket.socket, data: bytes, size: int) -> int:
    """One send of `data` as datagrams of `size` bytes, the size told with it: each run has its own."""
    return sender.sendmsg([data], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))])


@BOTH
def test_a_run_crosses_a_veth_as_one_buffer(namespace: Namespace, version: int) -> None:
    """UDP_SEGMENT on one side, UDP_GRO on the other: 44 datagrams are one send and one receive. The
    control message is an int, and each call needs room for it and for 64 KiB."""
    with sockets(namespace, version) as (sender, receiver):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        size = PAYLOAD[version]
        assert send_segments(sender, bytes(44 * size), size) == 44 * size
        data, control, flags, _ = receiver.recvmsg(1 << 16, socket.CMSG_SPACE(4))
    assert (len(data), flags) == (44 * size, 0)
    assert control == [(socket.IPPROTO_UDP, UDP_GRO, struct.pack("=i", size))]


@BOTH
def test_without_udp_gro_a_run_arrives_as_datagrams(namespace: Namespace, version: int) -> None:
    """The kernel cuts for a socket that did not ask: no receiver need know that the sender made runs."""
    with sockets(namespace, version) as (sender, receiver):
        send_segments(sender, bytes(2500), 1000)
        assert [len(receiver.recv(1 << 16)) for _ in range(3)] == [1000, 1000, 500]


def test_a_buffer_too_small_for_a_run_loses_its_tail(namespace: Namespace) -> None:
    """MSG_TRUNC is the only sign. So with UDP_GRO on, buffers hold 64 KiB."""
    with sockets(namespace, 4) as (sender, receiver):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        send_segments(sender, bytes(3000), 1000)
        send_segments(sender, b"next", 1000)
        data, _, flags, _ = receiver.recvmsg(2048, socket.CMSG_SPACE(4))
        assert (len(data), flags & socket.MSG_TRUNC) == (2048, socket.MSG_TRUNC)
        assert receiver.recv(2048) == b"next"


@pytest.mark.parametrize(("version", "limit"), [(4, 65507), (6, 65527)])
def test_the_bytes_of_a_run_are_limited(namespace: Namespace, version: int, limit: int) -> None:
    """45 datagrams of 1472 bytes are one too many: EMSGSIZE, and nothing of it was sent."""
    with sockets(namespace, version) as (sender, receiver):
        size = PAYLOAD[version]
        with pytest.raises(OSError, match="Message too long"):
            send_segments(sender, bytes(limit + 1), size)
        send_segments(sender, b"next", size)
        assert receiver.recv(2048) == b"next"


def test_a_run_has_at_least_64_segments(namespace: Namespace) -> None:
    """64 before 6.9, 128 from then on: 64 is what a run may always have."""
    with sockets(namespace, 4) as (sender, receiver):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        send_segments(sender, bytes(64 * 100), 100)
        assert len(receiver.recv(1 << 16)) == 6400


def test_segments_without_a_checksum_are_refused(namespace: Namespace) -> None:
    """VXLAN's "checksum SHOULD be zero" and UDP_SEGMENT exclude each other: EINVAL. So ours is on."""
    with sockets(namespace, 4) as (sender, _):
        sender.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        with pytest.raises(OSError, match="Invalid argument"):
            send_segments(sender, bytes(2000), 1000)


@BOTH
def test_segments_larger_than_the_path_are_refused(namespace: Namespace, version: int) -> None:
    """An MTU event of one peer. EINVAL before 6.14, EMSGSIZE from then on."""
    with sockets(namespace, version) as (sender, _):
        refuse_fragments(sender)
        size = PAYLOAD[version] + 1
        with pytest.raises(OSError, match=r"Message too long|Invalid argument"):
            send_segments(sender, bytes(2 * size), size)


@BOTH
def test_oversize_is_refused_and_not_fragmented(namespace: Namespace, version: int) -> None:
    """With IP_PMTUDISC_DO the outer packet is never fragmented (RFC 7348 section 4.3): EMSGSIZE says so."""
    with sockets(namespace, version) as (sender, receiver):
        refuse_fragments(sender)
        with pytest.raises(OSError, match="Message too long"):
            sender.send(bytes(PAYLOAD[version] + 1))
        sender.send(bytes(PAYLOAD[version]))
        assert len(receiver.recv(2048)) == PAYLOAD[version]


@BOTH
def test_tos_is_told_of_each_datagram(namespace: Namespace, version: int) -> None:
    """What RFC 6040 needs on decapsulation. IPv4 tells one byte, IPv6 an int."""
    level, ask, kind = {
        4: (socket.IPPROTO_IP, socket.IP_RECVTOS, socket.IP_TOS),
        6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, socket.IPV6_TCLASS),
    }[version]
    with sockets(namespace, version) as (sender, receiver):
        receiver.setsockopt(level, ask, 1)
        for tos in (0, 3, 2, 0xB9):
            # Set on the socket, because a control message with ToS is a feature of its own.
            sender.setsockopt(level, kind, tos)
            sender.send(bytes([tos]))
        for _ in range(4):
            data, control, _, _ = receiver.recvmsg(100, socket.CMSG_SPACE(4))
            assert control == [(level, kind, bytes(data) if version == 4 else struct.pack("=i", data[0]))]


@BOTH
def test_tos_may_be_said_for_each_send(namespace: Namespace, version: int) -> None:
    """What RFC 6040 needs on encapsulation: one socket, many values."""
    level, ask, kind = {
        4: (socket.IPPROTO_IP, socket.IP_RECVTOS, socket.IP_TOS),
        6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, socket.IPV6_TCLASS),
    }[version]
    with sockets(namespace, version) as (sender, receiver):
        receiver.setsockopt(level, ask, 1)
        sender.sendmsg([b"payload"], [(level, kind, struct.pack("=i", 2))])
        _, control, _, _ = receiver.recvmsg(100, socket.CMSG_SPACE(4))
    assert control[0][2][0] == 2


def test_gro_does_not_merge_different_tos(namespace: Namespace) -> None:
    """So one ToS message speaks for every datagram of a run that was received."""
    with sockets(namespace, 4) as (sender, receiver):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        for tos in (1, 2):
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
            send_segments(sender, bytes(3000), 1000)
        for tos in (1, 2):
            data, control, _, _ = receiver.recvmsg(1 << 16, socket.CMSG_SPACE(4) * 2)
            assert len(data) == 3000
            assert (socket.IPPROTO_IP, socket.IP_TOS, bytes([tos])) in control


def test_a_dead_peer_does_not_fail_sends_of_an_unconnected_socket(namespace: Namespace) -> None:
    """ICMP "port unreachable" becomes ECONNREFUSED on a connected socket only. Ours serve many peers and
    are not connected: one peer's trouble never fails a send to another."""
    one, other = namespace(), namespace()
    veth(one, other, ADDRESSES[4], 24)
    here, there = ADDRESSES[4]
    with udp_socket(one, here) as unconnected, udp_socket(one, here) as connected:
        connected.connect((there, 9))
        for _ in range(2):
            unconnected.sendto(b"payload", (there, 9))
        connected.send(b"payload")
        with pytest.raises(ConnectionRefusedError):
            connected.recv(100)
        unconnected.sendto(b"payload", (there, 9))
