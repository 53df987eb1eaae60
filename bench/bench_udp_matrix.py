"""What each of UDP_SEGMENT, UDP_GRO and sendmmsg/recvmmsg is worth by itself, without a pump: 128 datagrams
from one socket to another over loopback."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import pytest

from bench import loops, stage
from bench.conftest import PerPacket
from fastpath.kernel.udp import open_receiver, open_sender

ADDRESS = "127.0.71.1"
DATAGRAM_BYTES = 1458


@pytest.mark.benchmark(group="UDP matrix")
@pytest.mark.parametrize("mmsg", [False, True], ids=["one by one", "mmsg"])
@pytest.mark.parametrize("gro", [False, True], ids=["no GRO", "GRO"])
@pytest.mark.parametrize("gso", [False, True], ids=["no GSO", "GSO"])
def test_transfer(per_packet: PerPacket, gso: bool, gro: bool, mmsg: bool) -> None:
    with ExitStack() as stack:
        receiver, sender = open_receiver(ADDRESS, 0, gro=gro), open_sender(ADDRESS)
        for fd in (receiver, sender):
            stack.callback(os.close, fd)
        transfer = loops.Transfer(
            sender, receiver, socket.inet_aton(ADDRESS), stage.port_of(receiver), DATAGRAM_BYTES
        )
        count = transfer.datagrams
        arrived = per_packet(transfer.run, gso, mmsg, packets=count, packet_bytes=DATAGRAM_BYTES)
    assert arrived == count * DATAGRAM_BYTES
