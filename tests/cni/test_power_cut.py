"""The store after a power cut: what was told to be on disk is there, whatever became of all else.

A process works on a store under strace. From its writes and fsyncs images of the disk are made as a cut at
each moment could leave it: what was fsync'd, and of the writes since then none, all or some, torn at sectors.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from cni.ipam import Pool
from cni.request import Attachment
from cni.store import Holder, Store
from tests.cni.conftest import REPOSITORY

LIVES = 24
SECTOR = 512
POOLS = (
    (Pool.of_prefix(ip_network("10.71.0.0/24"), ip_address("10.71.0.1")),),
    (Pool.of_prefix(ip_network("fd71::/64"), ip_address("fd71::1")),),
)
TRACED = "trace=openat,pwrite64,ftruncate,fsync,fdatasync,unlink,write,close"
CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)")


def work(state_dir: Path) -> None:
    """Pods come, and every third goes; each is told on stdout once the store has said that it is done."""
    store = Store(state_dir, "boot", 0.0)
    store._run("PRAGMA wal_autocheckpoint = 20")  # a few come in between
    for number in range(LIVES):
        attachment = Attachment("podnet", f"c{number}", "eth0")
        store.reserve(attachment, Holder(f"pl{number}", "loom0"), POOLS, float(number))
        store.complete(attachment, float(number))
        sys.stdout.write(f"+{number}\n")
        sys.stdout.flush()
        if number % 3 == 2:
            sys.stdout.write(f"?{number}\n")
            sys.stdout.flush()
            store.release(attachment, float(number))
            sys.stdout.write(f"-{number}\n")
            sys.stdout.flush()
    store.close()


class Disk:
    """The files of one directory: what is on disk for sure, and what was written since."""

    def __init__(self) -> None:
        self.durable: dict[str, bytes] = {}
        self.pending: dict[str, list[tuple[int, bytes]]] = {}  # (offset, data); a negative offset truncates

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.pending.setdefault(name, []).append((offset, data))

    def sync(self, name: str) -> None:
        self.durable[name] = applied(self.durable.get(name, b""), self.pending.pop(name, []))

    def unlink(self, name: str) -> None:
        self.durable.pop(name, None)
        self.pending.pop(name, None)

    def images(self, chance: random.Random, torn: int) -> Iterator[dict[str, bytes]]:
        """Nothing written since the last sync, all of it, and `torn` times a part."""
        names = {*self.durable, *self.pending}
        for keep in (0.0, 1.0, *[0.5] * torn):
            yield {
                name: applied(
                    self.durable.get(name, b""),
                    [
                        piece
                        for write in self.pending.get(name, [])
                        for piece in sectors(*write)
                        if chance.random() < keep
                    ],
                )
                for name in names
            }


def sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    pieces = [(offset + at, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR)]
    return pieces if offset >= 0 else [(offset, data)]


def applied(content: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    made = bytearray(content)
    for offset, data in writes:
        if offset < 0:
            del made[-1 - offset :]
            continue
        made.extend(bytes(max(0, offset - len(made))))
        made[offset : offset + len(data)] = data
    return bytes(made)


def calls(trace: Path) -> Iterator[tuple[str, list[str], int]]:
    """(system call, its arguments, its result), in order."""
    for line in trace.read_text().splitlines():
        if found := CALL.match(line):
            yield found[1], found[2].split(", "), int(found[3])


def text(quoted: str) -> bytes:
    return bytes.fromhex(quoted.strip('"').replace("\\x", ""))


def replay(trace: Path, state_dir: Path) -> Iterator[tuple[Disk, set[int], set[int]]]:
    """(the disk, who is attached for sure, who may be), before each system call that changes anything."""
    disk, files = Disk(), dict[int, str]()
    attached, unsure = set[int](), {0}
    for name, args, result in calls(trace):
        file = files.get(int(args[0])) if args[0].isdigit() else None
        if name == "openat" and result >= 0:
            path = Path(text(args[1]).decode())
            files.pop(result, None)
            if path.parent == state_dir and not path.name.endswith("-shm"):  # made anew from the others
                files[result] = path.name
        elif name == "write" and args[0] == "1":
            for word in text(args[1]).decode().split():
                number = int(word[1:])
                {"+": attached.add, "-": lambda _: None, "?": attached.discard}[word[0]](number)
                unsure = {number} if word[0] == "?" else {number + 1}
        elif name in ("pwrite64", "ftruncate", "fsync", "fdatasync") and file and result >= 0:
            yield disk, attached, unsure
            if name == "pwrite64":
                disk.write(file, int(args[3]), text(args[1]))
            elif name == "ftruncate":
                disk.write(file, -1 - int(args[1]), b"")
            else:
                disk.sync(file)
        elif name == "unlink" and result == 0 and Path(text(args[0]).decode()).parent == state_dir:
            yield disk, attached, unsure
            disk.unlink(Path(text(args[0]).decode()).name)
    yield disk, attached, unsure


def assert_usable(image: dict[str, bytes], directory: Path, attached: set[int], unsure: set[int]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in image.items():
        (directory / name).write_bytes(content)
    store = Store(directory, "boot", 100.0)
    try:
        records = {int(record.attachment.container[1:]): record for record in store.records()}
        assert attached <= records.keys() <= attached | unsure
        assert {tuple(lease.address.version for lease in record.leases) for record in records.values()} <= {
            (4, 6)
        }
        (four, six) = store.reserve(Attachment("podnet", "new", "eth0"), Holder("pl", "loom0"), POOLS, 100.0)
        held = {lease.address for record in records.values() for lease in record.leases}
        assert not held & {four.address, six.address}
    finally:
        store.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stride", "torn"),
    [pytest.param(7, 1, id="some"), pytest.param(1, 6, id="all", marks=pytest.mark.slow)],
)
def test_a_power_cut_at_any_moment(tmp_path: Path, record_property: Any, stride: int, torn: int) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace: the store after a power cut is NOT tested in this run")
    trace, state_dir, chance = tmp_path / "trace", tmp_path / "state", random.Random(1)
    script = (
        f"from pathlib import Path; from tests.cni.test_power_cut import work; work(Path({str(state_dir)!r}))"
    )
    subprocess.run(
        ["strace", "-e", TRACED, "-xx", "-s", "70000", "-o", str(trace), sys.executable, "-c", script],
        check=True,
        capture_output=True,
        cwd=REPOSITORY,
    )
    tested = moments = 0
    for moments, (disk, attached, unsure) in enumerate(replay(trace, state_dir)):
        if moments % stride == 0:
            for image in disk.images(chance, torn):
                assert_usable(image, tmp_path / "image", attached, unsure)
                tested += 1
    record_property("disks in use again", f"{tested}, after cuts at {moments // stride + 1} moments")
    assert moments > 100
    assert len(attached) == LIVES - LIVES // 3
