from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.nodes import Node
from tests.netns_tools import Namespace, join


@pytest.fixture
def node(tun: None, netns: Callable[[], Namespace], tmp_path: Path) -> Iterator[Node]:
    """A node with an underlay that leads nowhere; its daemon ends with the test."""
    with ExitStack() as undo:
        node = Node(1, netns(), tmp_path / "n1")
        undo.callback(node.clean_up)
        node.namespace.ip("link", "add", "eth0", "type", "veth", "peer", "name", "wire")
        for end in ("eth0", "wire"):
            node.namespace.ip("link", "set", end, "up")
        add_underlay(node)
        yield node


@pytest.fixture
def pair(tun: None, netns: Callable[[], Namespace], tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes on one wire, not yet each other's peers."""
    with ExitStack() as undo:
        nodes = Node(1, netns(), tmp_path / "n1"), Node(2, netns(), tmp_path / "n2")
        join(nodes[0].namespace, nodes[1].namespace)
        for node in nodes:
            undo.callback(node.clean_up)
            add_underlay(node)
        yield nodes


def add_underlay(node: Node) -> None:
    node.namespace.ip("addr", "add", f"192.0.2.{node.number}/24", "dev", "eth0")
    node.namespace.ip("addr", "add", f"2001:db8::{node.number}/64", "dev", "eth0", "nodad")
