"""GC among ADDs and DELs that come in between wherever they can: it frees what is dead, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast

import pytest

from cni import upkeep
from cni.ipam import Pool
from cni.netlink import Netlink
from cni.request import Attachment, Request
from cni.store import Holder, Store

POOL = Pool.of_prefix(ip_network("10.71.0.0/24"), ip_address("10.71.0.1"))


class NoLinks:
    """A node whose links are gone: what is freed is the store's part."""

    def find_link(self, _: str) -> None: ...

    def links(self) -> list[Any]:
        return []


class Node:
    """A store and what its runtime knows to be attached. Each step takes a second."""

    def __init__(self, state_dir: Path, chance: random.Random) -> None:
        self.store, self.chance, self.now, self.number = Store(state_dir, "boot", 0.0), chance, 1.0, 0
        self.store._run("PRAGMA synchronous = OFF")  # what is tested here is not the disk
        self.living: set[Attachment] = set()
        self.collected = 0

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def step(self) -> None:
        """A pod comes, goes, or goes without its DEL."""
        kind = self.chance.choice("aaadl")
        if kind == "a" and len(self.living) < 40:
            self.number += 1
            new = Attachment("podnet", f"c{self.number}", "eth0")
            self.store.reserve(new, Holder(f"pl{self.number}", "loom0"), [(POOL,)], self.tick())
            self.store.complete(new, self.tick())
            self.store._run("PRAGMA synchronous = OFF")
            self.living.add(new)
        elif kind != "a" and self.living:
            gone = self.chance.choice(sorted(self.living, key=str))
            self.living.discard(gone)
            if kind == "d":
                self.store.release(gone, self.tick())

    def collect(self) -> None:
        """The list of the valid is made, then GC begins; it is held up before each of its removals."""
        valid = frozenset((each.container, each.ifname) for each in self.living)
        dead = {record.attachment for record in self.store.records()} - self.living
        request = Request("GC", "1.1.0", network="podnet", config={}, valid=valid)
        began_at = self.tick()
        self.step()
        upkeep.collect(request, self.store, cast("Netlink", NoLinks()), self.exclusively, began_at)
        left = {record.attachment for record in self.store.records()}
        assert self.living <= left, "a live pod's address was freed"
        assert not dead & left, "a dead pod's address was kept"
        self.collected += len(dead)

    @contextmanager
    def exclusively(self, _: Attachment) -> Iterator[None]:
        if self.chance.random() < 0.3:
            self.step()
        yield


@pytest.mark.parametrize(
    "rounds", [pytest.param(300, id="some"), pytest.param(10_000, id="all", marks=pytest.mark.slow)]
)
def test_gc_frees_the_dead_and_never_a_live_one(tmp_path: Path, rounds: int, record_property: Any) -> None:
    node = Node(tmp_path, random.Random(2))
    try:
        for _ in range(rounds):
            for _ in range(node.chance.randrange(4)):
                node.step()
            node.collect()
    finally:
        node.store.close()
    record_property("freed", f"{node.collected} dead, no live one, by {rounds} GCs among {node.number} ADDs")
    assert node.collected > rounds // 10
