"""The other nodes of a large cluster: their records in an etcd, and a place where their datagrams arrive."""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import struct
import threading
import time
from base64 import b64encode
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from forwarder.demo import netns
from forwarder.demo.lab import VNI
from forwarder.probe import PROBE_BYTES, WINDOW, Padded, Report, decode, encode_report

NODES: Final = "/podloom/nodes/"
PORTS: Final = (7001, 7002)
"""Where the crowd takes datagrams; a node that moves goes from one to the other."""
ENDPOINTS: Final = "198.18.0.0/15"
"""RFC 2544: for benchmarks."""
GENEVE_PORT: Final = 6081
"""Of the nodes that send to the crowd."""
OPERATIONS: Final = 100
"""In one transaction; etcd takes 128."""
_SECONDS: Final = 10.0
_TYPE: Final = slice(20, 22)
"""Of the inner Ethernet header, behind a Geneve header without options."""
_PROBE: Final = b"\x88\xb5"  # fastpath/wire/probe.pxd
_IP_PKTINFO, _SO_RCVBUFFORCE = 8, 33  # linux/in.h, asm-generic/socket.h


def prefixes(number: int) -> tuple[str, str]:
    """Of each node an IPv4 /29 and an IPv6 /64."""
    return f"10.71.{number >> 5}.{number % 32 * 8}/29", f"fd71:0:0:{0x1000 + number:x}::/64"


def record(number: int, port: int, features: tuple[str, ...]) -> dict[str, Any]:
    """What node `number` says of itself."""
    return {
        "id": f"crowd-{number}",
        "endpoints": [f"198.18.{number >> 8}.{number & 0xFF}"],
        "port": port,
        "encapsulation": "geneve",
        "vni": VNI,
        "router_mac": f"02:70:6d:00:{number >> 8:02x}:{number & 0xFF:02x}",
        "prefixes": list(prefixes(number)),
        "features": list(features),
    }


class Registry:
    """An etcd, by the HTTP of its gateway; one connection, used by one thread at a time."""

    def __init__(self, namespace: Path, url: str) -> None:
        self.features: tuple[str, ...] = ()
        """What nodes announce that they can do."""
        place = urlsplit(url)
        assert place.hostname is not None
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=_SECONDS)
        with netns.inside(namespace):
            self._connection.connect()
        assert self._connection.sock is not None
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._connection.close()

    def put(self, numbers: Iterable[int], port: int = PORTS[0]) -> None:
        """These nodes say that they are there."""
        operations = [
            {"request_put": {"key": _key(number), "value": _text(json.dumps(told))}}
            for number in numbers
            for told in [record(number, port, self.features)]
        ]
        for start in range(0, len(operations), OPERATIONS):
            self._ask("txn", {"success": operations[start : start + OPERATIONS]})

    def remove(self, number: int) -> None:
        self._ask("deleterange", {"key": _key(number)})

    def _ask(self, what: str, body: dict[str, Any]) -> None:
        self._connection.request("POST", f"/v3/kv/{what}", json.dumps(body))
        response = self._connection.getresponse()
        said = response.read()
        assert response.status == 200, said


class Churn:
    """Changes `a_second` of them, one node after the other: it leaves, comes back, moves, and moves back. At
    the end all are there."""

    def __init__(self, registry: Registry, numbers: Iterable[int], a_second: float) -> None:
        """The registry is for it alone, and closed by it."""
        self.changes = 0
        self._registry = registry
        self._numbers = list(numbers)
        self._pause = 1 / a_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._registry.put([self._number])
        self._registry.close()

    @property
    def _number(self) -> int:
        return self._numbers[self.changes // 4 % len(self._numbers)]

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            number = self._number
            match self.changes % 4:
                case 0:
                    self._registry.remove(number)
                case 2:
                    self._registry.put([number], PORTS[1])
                case _:
                    self._registry.put([number])
            self.changes += 1
            due += self._pause


class Place:
    """Where everything that is sent to the crowd arrives: probes are answered, of the rest it is noted that
    it came."""

    def __init__(self, namespace: Path) -> None:
        self.answered = 0
        self._sockets: dict[int, socket.socket] = {}
        self._arrived = {port: threading.Event() for port in PORTS}
        self._reports: dict[bytes, tuple[int, int]] = {}
        """Of each node, by its address: the last report's sequence, and the last padded probe heard."""
        for port in PORTS:
            opened = netns.open_socket(namespace, socket.AF_INET, socket.SOCK_DGRAM)
            opened.bind(("0.0.0.0", port))
            opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
            self._sockets[port] = opened
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._sockets.values():
            one.close()

    def drain(self, port: int) -> None:
        """Forget what has arrived at a port."""
        self._arrived[port].clear()

    def arrives(self, port: int, seconds: float) -> bool:
        """Whether a packet has come, or comes within so long."""
        return self._arrived[port].wait(seconds)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for port, one in self._sockets.items():
                selector.register(one, selectors.EVENT_READ, port)
            while not self._stop.is_set():
                for key, _ in selector.select(0.1):
                    datagram, ancillary, _, source = self._sockets[key.data].recvmsg(2048, 64)
                    if datagram[_TYPE] == _PROBE:
                        self._answer(self._sockets[key.data], datagram, ancillary[0][2], source[0])
                    else:
                        self._arrived[key.data].set()

    def _answer(self, at: socket.socket, datagram: bytes, info: bytes, asker: str) -> None:
        """As a node does that hears everything: a report for each report."""
        address, probe = info[8:12], decode(datagram[_TYPE.stop :][:PROBE_BYTES])  # struct in_pktinfo, ip(7)
        sequence, padded = self._reports.get(address, (0, 0))
        if isinstance(probe, Padded):
            self._reports[address] = sequence, probe.number
        elif probe is not None:
            self._reports[address] = sequence + 1, padded
            report = Report(
                session=2,
                sequence=sequence + 1,
                interval_ms=probe.interval_ms,
                detect_multiplier=3,
                hears=True,
                heard_session=probe.session,
                heard_sequence=probe.sequence,
                heard_mask=(1 << WINDOW) - 1,
                heard_padded=padded,
            )
            header = datagram[:8] + datagram[14:20] + datagram[8:14] + _PROBE
            came_from = struct.pack("=i4s4s", 0, address, address)
            at.sendmsg(
                [header + encode_report(report)],
                [(socket.IPPROTO_IP, _IP_PKTINFO, came_from)],
                0,
                (asker, GENEVE_PORT),
            )
            self.answered += 1


def _key(number: int) -> str:
    return _text(f"{NODES}crowd-{number}")


def _text(value: str) -> str:
    return b64encode(value.encode()).decode()
