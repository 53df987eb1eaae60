"""Kernel behaviour we rely on, asked of the running kernel without any code of ours in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forwarder.demo import netns
from forwarder.demo.lab import link_index, netlink

Namespace = Callable[[], Path]


@pytest.fixture
def namespace(root: None) -> Iterator[Namespace]:
    """Makes network namespaces with lo up; all are gone after the test."""
    with ExitStack() as undo:
        made = 0

        def make() -> Path:
            nonlocal made
            made += 1
            name = f"plas{os.getpid():x}-{made}"
            undo.callback(netns.delete, name)
            path = netns.create(name)
            with netlink(path) as ip:
                ip.link("set", index=link_index(ip, "lo"), state="up")
            return path

        yield make
