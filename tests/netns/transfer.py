"""A TCP transfer that goes on for as long as a test likes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from cni.netns import call_in
from tests.netns.nodes import until

CHUNK_BYTES = 1 << 16
CHUNK_SECONDS = 0.005
STEP_BYTES = 2 << 20
"""Enough to come through that the transfer surely goes on: more than the sockets' buffers hold."""


class Transfer:
    """Bytes from one namespace to an address in another over TCP, some MB/s, until the end of the `with`;
    then whether what arrived is what was sent."""

    def __init__(self, source: Path, destination: Path, address: str) -> None:
        self.arrived = 0
        self._source, self._destination, self._address = source, destination, address
        self._ending = threading.Event()
        self._sent, self._received = sha256(), sha256()

    def __enter__(self) -> Transfer:
        address = (self._address, 5001)
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        with in_namespace(self._destination, socket.create_server, address, family=family) as server:
            self._sender = in_namespace(self._source, socket.create_connection, address, 5.0)
            self._receiver, _ = server.accept()
        self._sender.settimeout(None)
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ending.set()
        if failure[0] is not None:
            self._sender.shutdown(socket.SHUT_RDWR)
            self._receiver.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        self._sender.close()
        self._receiver.close()
        if failure[0] is None:
            assert self._received.digest() == self._sent.digest()

    def _send(self) -> None:
        try:
            while not self._ending.wait(CHUNK_SECONDS):
                chunk = os.urandom(CHUNK_BYTES)
                self._sent.update(chunk)
                self._sender.sendall(chunk)
            self._sender.shutdown(socket.SHUT_WR)
        except OSError:
            return  # The test has failed already and closed it.

    def _receive(self) -> None:
        while data := self._receiver.recv(CHUNK_BYTES):
            self._received.update(data)
            self.arrived += len(data)

    def goes_on(self) -> None:
        before = self.arrived
        until(lambda: self.arrived > before + STEP_BYTES, "the transfer", 15)


def in_namespace(namespace: Path, function: Callable[..., socket.socket], *args: Any, **kwargs: Any) -> Any:
    with namespace.open() as netns:
        return call_in(netns.fileno(), function, *args, **kwargs)
