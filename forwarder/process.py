"""This process and its host: what it needs to start, one daemon to a directory, and telling systemd."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from forwarder.links import TUN_DEVICE

log = logging.getLogger("podloom")


class StartError(RuntimeError):
    """The daemon cannot start or go on; the text says why and what to do."""


def require_privileges() -> None:
    """StartError unless this process may make links, and TAPs can be opened."""
    net_admin = 1 << 12  # CAP_NET_ADMIN, linux/capability.h
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    if not int(effective, 16) & net_admin:
        raise StartError(
            "podloom up makes links and routes, which needs CAP_NET_ADMIN: run it as root (sudo podloom up)"
        )
    if not TUN_DEVICE.exists():
        raise StartError(
            f"{TUN_DEVICE} is missing: load the tun module (modprobe tun), or hand the device into "
            "this container"
        )


@contextmanager
def run_directory(path: Path) -> Iterator[None]:
    """The directory of the control socket, ours alone and for one daemon at a time."""
    with ExitStack() as stack:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            lock = stack.enter_context((path / "lock").open("a"))
        except OSError as error:
            raise StartError(f"{path} cannot be used: {error.strerror}; correct node.run_dir") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another podloom runs on {path}: stop it first, or give this one its own node.run_dir"
            ) from None
        yield


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", state, error.strerror)
