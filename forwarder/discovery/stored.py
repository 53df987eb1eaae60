"""The last good peers, kept on disk for a start at which the source is away.

Whatever the file has become, reading it is no error: it is a memory, and what it says is checked like any
other record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from forwarder.addresses import Network
from forwarder.config import read_record, record_table
from forwarder.faults import ConfigError
from forwarder.peers import PeerRecord
from forwarder.registry import Refusal, Said

FILE: Final = "peers.json"
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """`saved_at` is Unix time, for people: nothing is decided by it. `prefixes` are this node's own."""

    source: str
    saved_at: float
    prefixes: tuple[Network, ...]
    said: Mapping[str, Said]


def read(state_dir: Path, source: str) -> Stored | None:
    """What was kept of this source, None if nothing usable was."""
    try:
        text = (state_dir / FILE).read_bytes()
        table = json.loads(text)
        if not isinstance(table, dict) or (table["version"], table["source"]) != (VERSION, source):
            return None
        prefixes = tuple(ip_network(prefix) for prefix in table["prefixes"])
        said = {f"{FILE}: peer[{index}]": _read(row, index) for index, row in enumerate(table["peers"])}
        return Stored(source, float(table["saved_at"]), prefixes, said)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read(row: Mapping[str, Any], index: int) -> Said:
    try:
        return read_record(row, f"{FILE}: peer[{index}]")
    except ConfigError as error:
        return Refusal(error.faults)


def write(
    state_dir: Path,
    source: str,
    saved_at: float,
    prefixes: Iterable[Network],
    records: Iterable[PeerRecord],
) -> None:
    """Replace what is kept. OSError if it cannot be; the old file is then still whole."""
    about = {
        "version": VERSION,
        "source": source,
        "saved_at": saved_at,
        "prefixes": [str(prefix) for prefix in prefixes],
    }
    # A peer a line, for people; json's own indentation takes ten times as long, with thousands of peers.
    rows = ",\n".join(json.dumps(record_table(record)) for record in records)
    text = f'{json.dumps(about)[:-1]}, "peers": [\n{rows}\n]}}\n'
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state_dir / FILE
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
