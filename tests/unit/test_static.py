from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from forwarder import config
from forwarder.discovery import Snapshot, Trouble, static
from forwarder.discovery.static import Signature, StaticSource, read
from forwarder.peers import PeerRecord

POLL_SECONDS = 0.01
DEADLINE_SECONDS = 10.0

MAIN = """
[cluster]
cidrs = ["10.42.0.0/16"]
[node]
id = "a"
endpoints = ["192.0.2.1"]
prefixes = ["10.42.1.0/24"]
"""


def peer(number: int) -> str:
    return f"""
[[peer]]
id = "n{number}"
endpoints = ["192.0.2.{number}"]
prefixes = ["10.42.{number}.0/24"]
"""


def main_config(path: Path, more: str = "") -> config.Config:
    return config.parse(f'{MAIN}[discovery]\nfile = "{path}"\n{more}')


def ids(item: Snapshot | Trouble) -> list[str]:
    assert isinstance(item, Snapshot), item
    return [record.id for record in item.said.values() if isinstance(record, PeerRecord)]


def faults(item: Snapshot | Trouble) -> tuple[str, ...]:
    assert isinstance(item, Trouble), item
    return item.faults


def replace_file(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


Next = Callable[[], Coroutine[Any, Any, Snapshot | Trouble]]


def follow(source: StaticSource, story: Callable[[Next], Coroutine[Any, Any, None]]) -> None:
    """Run a story that is given the source's next item as often as it asks."""

    async def told() -> None:
        stream: AsyncIterator[Snapshot | Trouble] = source.watch()

        async def following() -> Snapshot | Trouble:
            return await asyncio.wait_for(anext(stream), DEADLINE_SECONDS)

        await story(following)

    asyncio.run(told())


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(2))

    async def story(following: Next) -> None:
        assert ids(await following()) == ["n2"]
        replace_file(path, peer(2) + peer(3))
        assert ids(await following()) == ["n2", "n3"]
        path.write_text("")  # in place
        assert ids(await following()) == []
        replace_file(path, peer(4))
        assert ids(await following()) == ["n4"]

    follow(StaticSource(main_config(path), poll_seconds=POLL_SECONDS), story)


def test_a_bad_file_is_told_once_and_a_good_one_heals(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(2))

    async def story(following: Next) -> None:
        assert ids(await following()) == ["n2"]
        replace_file(path, peer(2).replace("endpoints", "endpoint") + "[nonsense]\n")
        assert [fault.removeprefix(f"{path}: ").split(" ")[0] for fault in faults(await following())] == [
            "peer[0].endpoint",
            "peer[0].endpoints",
            "nonsense",
        ]
        path.unlink()
        (fault,) = faults(await following())
        assert "No such file" in fault
        replace_file(path, peer(3))
        assert ids(await following()) == ["n3"]

    follow(StaticSource(main_config(path), poll_seconds=POLL_SECONDS), story)


def test_a_file_that_grows_in_place_is_read_when_it_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file would be valid TOML with half of the peers."""
    path = tmp_path / "peers.toml"
    path.write_text(peer(2))
    script = [Signature(1, size, size) for size in (100, 100, 50, 60, 70, 70)]
    asked = iter(script)
    monkeypatch.setattr(static, "signature", lambda _: next(asked))

    async def story(following: Next) -> None:
        assert ids(await following()) == ["n2"]
        assert ids(await following()) == ["n2"]
        assert next(asked, None) is None, "it was read before it rested"

    follow(StaticSource(main_config(path), poll_seconds=POLL_SECONDS), story)


def test_a_file_that_is_written_all_the_time_and_then_replaced_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(2))
    script: list[Signature | None] = [
        Signature(1, 1, 1),
        Signature(1, 2, 2),
        Signature(1, 3, 3),
        Signature(2, 9, 4),
    ]
    asked = iter(script)
    monkeypatch.setattr(static, "signature", lambda _: next(asked))

    async def story(following: Next) -> None:
        await following()
        assert ids(await following()) == ["n2"]

    follow(StaticSource(main_config(path), poll_seconds=POLL_SECONDS), story)


def test_peers_of_the_main_file_and_of_the_peers_file_are_one_set(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(3))
    assert ids(read(main_config(path, peer(2)), file_exists=True)) == ["n3", "n2"]
    path.write_text(peer(3) + peer(2))
    assert f'{path}: the main file\'s peer[0].id = "n2": must be unique; peer[1] has it' in faults(
        read(main_config(path, peer(2)), file_exists=True)
    )


def test_a_peer_that_is_ourselves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(2).replace('"n2"', '"a"'))
    assert faults(read(main_config(path), file_exists=True)) == (
        f'{path}: peer[0].id = "a": is this node\'s own id; must name another node',
    )


def test_nobody_needs_the_default_file(tmp_path: Path) -> None:
    default = config.parse(MAIN + peer(2))
    assert ids(read(default, file_exists=False)) == ["n2"]
    assert faults(read(main_config(tmp_path / "asked-for.toml"), file_exists=False))


def test_binary_junk_and_a_directory_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_bytes(os.urandom(4096) + b"\xff")
    assert "UTF-8" in faults(read(main_config(path), file_exists=True))[0]
    assert "Is a directory" in faults(read(main_config(tmp_path), file_exists=True))[0]


def test_a_node_that_moves_checks_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(peer(9))
    before = main_config(path)
    moved = replace(before, node=replace(before.node, endpoints=(ip_address("192.0.2.9"),)))
    source = StaticSource(before, poll_seconds=POLL_SECONDS)

    async def story(following: Next) -> None:
        assert ids(await following()) == ["n9"]
        source.relocate(moved)
        (fault,) = faults(await following())
        assert "is this node's own" in fault
        replace_file(path, peer(5))
        assert ids(await following()) == ["n5"]

    follow(source, story)
