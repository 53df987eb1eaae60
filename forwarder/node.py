"""Who this node is: an id that survives restarts and address changes, and the MACs derived from it."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

from forwarder.addresses import derive_mac
from forwarder.config import Config, is_node_id

ID_FILE: Final = "node-id"


class IdentityError(RuntimeError):
    """The stored id cannot be read, made or used; the text says what to do."""


def identify(config: Config) -> Config:
    """The configuration with id and router MAC filled in."""
    node_id = config.node.id or stored_id(config.node.state_dir)
    router_mac = config.node.router_mac or derive_mac(node_id, "router")
    return replace(config, node=replace(config.node, id=node_id, router_mac=router_mac))


def gateway_mac(node_id: str) -> bytes:
    """loom0's own MAC, the one pods know their gateway by."""
    return derive_mac(node_id, "gateway")


def stored_id(state_dir: Path) -> str:
    """The id kept in the directory; made, and on disk before this returns, if there is none."""
    path = state_dir / ID_FILE
    try:
        try:
            text = path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return _store_new_id(path)
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(
            f"the node id in {path} cannot be kept: {error}; set node.id or repair it"
        ) from None
    if not is_node_id(text):
        raise IdentityError(
            f"{path} holds {text!r}, which is no node id: write the old one or remove the file"
        )
    return text


def _store_new_id(path: Path) -> str:
    node_id = str(uuid.uuid4())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="ascii") as file:
        file.write(node_id + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return node_id
