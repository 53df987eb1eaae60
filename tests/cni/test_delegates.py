"""Debian's IPAM plugins giving the addresses: static, host-local and dhcp by name."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP

from cni import netns
from tests.cni.conftest import Namespaces, Node, links_of
from tests.cni.runtime import DEBIAN_PLUGINS, debian_plugins

pytestmark = pytest.mark.root

GATEWAY = "10.71.0.1"
STATIC = {
    "type": "static",
    "addresses": [{"address": "10.71.0.40/24", "gateway": GATEWAY}, {"address": "fd71::40/64"}],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
}


@pytest.mark.parametrize("plugin", ["static", "host-local"])
def test_a_life_with_a_delegate(node: Node, namespaces: Namespaces, tmp_path: Path, plugin: str) -> None:
    """ADD, CHECK, a second pod, DEL; what is given is held in our store too, and STATUS and GC go through."""
    debian_plugins(plugin)
    local = {"type": plugin, "dataDir": str(tmp_path / "d"), "ranges": [[{"subnet": "10.71.0.0/24"}]]}
    conf = node.conf(ipam=STATIC if plugin == "static" else local)
    first, second, path = namespaces.new(), namespaces.new(), str(DEBIAN_PLUGINS)
    added = node.call("ADD", first, conf, CNI_PATH=path)
    assert added.exit == 0, added
    assert added.body["ips"][0]["address"] == ("10.71.0.40/32" if plugin == "static" else "10.71.0.2/32")
    assert node.call("CHECK", first, conf | {"prevResult": added.body}, CNI_PATH=path).exit == 0
    other = node.call("ADD", second, conf, CNI_PATH=path)
    assert (other.exit == 0) == (plugin == "host-local"), "static gives everybody the same"
    if plugin == "static":
        assert "10.71.0.40 is held by podnet/" in other.body["msg"]
    for pod in (first, second):
        assert node.call("DEL", pod, conf, CNI_PATH=path).exit == 0
    assert (node.held(), node.records(), sorted(links_of(first))) == ([], [], ["lo"])
    assert [file.name for file in (tmp_path / "d" / "podnet").glob("10.*")] == []


class Server(threading.Thread):
    """A DHCP server with one address to give, for a short while; `asked` are the types of what came."""

    def __init__(self, listener: socket.socket, address: str, seconds: int) -> None:
        super().__init__()
        self._listener, self._address, self._seconds = listener, address, seconds
        self._closed, self._closing = os.pipe()
        self.asked: list[int] = []

    def run(self) -> None:
        while self._closed not in select.select([self._listener.fileno(), self._closed], [], [])[0]:
            request = BOOTP(self._listener.recv(2048))
            kind = dict(option for option in request[DHCP].options if len(option) == 2)["message-type"]
            self.asked.append(kind)
            if kind in (1, 3):  # discover, request
                self._listener.sendto(self._answer(request, 2 if kind == 1 else 5), ("255.255.255.255", 68))

    def _answer(self, request: Any, kind: int) -> bytes:
        options = [
            ("message-type", kind),
            ("server_id", GATEWAY),
            ("lease_time", self._seconds),
            ("subnet_mask", "255.255.255.0"),
            ("router", GATEWAY),
            "end",
        ]
        head = BOOTP(
            op=2, xid=request.xid, yiaddr=self._address, siaddr=GATEWAY, chaddr=request.chaddr, flags=0x8000
        )
        return bytes(head / DHCP(options=options))

    def close(self) -> None:
        os.close(self._closing)
        self.join()
        os.close(self._closed)
        self._listener.close()


@contextmanager
def dhcp(node: Node, directory: Path, seconds: int) -> Iterator[tuple[Server, Path]]:
    """(a server on the node's bridge, the socket of the plugin's own daemon)."""

    def listener() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"loom0\0")
        made.bind(("", 67))
        return made

    fd = os.open(f"/run/netns/{node.name}", os.O_RDONLY)
    try:
        server = Server(netns.call_in(fd, listener), "10.71.0.66", seconds)
    finally:
        os.close(fd)
    path = directory / "dhcp.sock"
    daemon = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{node.name}", DEBIAN_PLUGINS / "dhcp", "daemon", "-socketpath", path],
        stderr=subprocess.DEVNULL,
    )
    server.start()
    try:
        until = time.monotonic() + 10
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        yield server, path
    finally:
        daemon.kill()
        daemon.wait()
        server.close()


@pytest.mark.slow
def test_dhcp_gives_an_address_and_renews_it(node: Node, namespaces: Namespaces, tmp_path: Path) -> None:
    """The guard lets the lease be asked for again: without that the plugin takes the pod's interface down."""
    debian_plugins("dhcp")
    pod, path = namespaces.new(), str(DEBIAN_PLUGINS)
    with dhcp(node, tmp_path, seconds=6) as (server, daemon_socket):
        conf = node.conf(ipam={"type": "dhcp", "daemonSocketPath": str(daemon_socket)})
        added = node.call("ADD", pod, conf, CNI_PATH=path)
        assert added.exit == 0, added
        assert [ip["address"] for ip in added.body["ips"]] == ["10.71.0.66/32"]
        until = time.monotonic() + 10
        while server.asked.count(3) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert server.asked.count(3) >= 3, f"asked: {server.asked}"
        assert node.call("CHECK", pod, conf | {"prevResult": added.body}, CNI_PATH=path).exit == 0
        assert node.call("DEL", pod, conf, CNI_PATH=path).exit == 0
    assert (node.held(), node.records()) == ([], [])
