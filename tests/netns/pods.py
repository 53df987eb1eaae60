"""Pods as the plugin attaches them, and what they and others see of each other."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from typing import Any

import pytest

from cni.netns import call_in
from tests.netns.nodes import Node
from tests.netns.test_names import cni
from tests.netns_tools import Namespace, run

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
UNDERLAY = {4: "192.0.2.{}", 6: "2001:db8::{}"}
SERVICE = {4: "10.43.0.10", 6: "fd43::10"}
PORT = 8080


def require_nft() -> None:
    if shutil.which("nft") is None:
        pytest.skip("no nft: masquerading, and Services that nft leads, are NOT tested in this run")


def plug(node: Node, pod: Namespace) -> dict[int, str]:
    """A pod attached by the plugin; its addresses by IP version."""
    addresses = [ip["address"].partition("/")[0] for ip in cni(node, "ADD", pod, name="web-0")["ips"]]
    return {6 if ":" in address else 4: address for address in addresses}


def in_namespace(namespace: Namespace, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with namespace.path.open() as netns:
        return call_in(netns.fileno(), function, *args, **kwargs)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def source_seen(
    server: Namespace, address: str, client: Namespace, asked: str = "", *, seconds: float = 5.0
) -> str:
    """The address that a TCP server on `address` sees a client come from, who asks for `asked` if that is
    another. TimeoutError if they do not meet."""
    listening = (address, PORT)
    with in_namespace(server, socket.create_server, listening, family=family_of(address)) as listener:
        listener.settimeout(seconds)
        with in_namespace(client, socket.create_connection, (asked or address, PORT), seconds):
            connection, peer = listener.accept()
            connection.close()
            return str(peer[0])


def lead(node: Node, version: int, protocol: str, service_port: int, backend: str, port: int) -> None:
    """Lead a port of the Service's address elsewhere, as kube-proxy does."""
    family = "ip" if version == 4 else "ip6"
    match = f"{family} daddr {SERVICE[version]} {protocol} dport {service_port}"
    target = f"{backend}:{port}" if version == 4 else f"[{backend}]:{port}"
    lines = (
        f"table {family} service {{",
        "  chain prerouting {",
        "    type nat hook prerouting priority -100;",
        f"    {match} dnat to {target}",
        "  }",
        "}",
        "",
    )
    run(node.namespace.command(["nft", "-f", "-"]), input="\n".join(lines))


def tables(node: Node) -> str:
    """Everything that nftables holds here."""
    return run(node.namespace.command(["nft", "list", "ruleset"]))
