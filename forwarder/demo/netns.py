"""Named network namespaces, kept as iproute2 keeps them: a mount of the namespace's file in /run/netns.

Only the calling thread ever changes namespace. A socket stays in the namespace it was opened in, and a
process starts in that of the thread that started it, so a short stay is all the lab needs.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 0x100000  # linux/mount.h
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def create(name: str) -> Path:
    """A new namespace under this name; its path. FileExistsError if the name is taken."""
    path = DIRECTORY / name
    _share_directory()
    path.touch(mode=0o444, exist_ok=False)
    failure: list[OSError] = []

    def unshare_and_mount() -> None:
        try:
            _call("unshare", _CLONE_NEWNET)
            _call("mount", b"/proc/thread-self/ns/net", bytes(path), b"none", _MS_BIND, None)
        except OSError as error:
            failure.append(error)

    # A thread of its own, because a thread that unshares has no way back it can be sure of.
    thread = threading.Thread(target=unshare_and_mount)
    thread.start()
    thread.join()
    if failure:
        path.unlink()
        raise failure[0]
    return path


def delete(name: str) -> None:
    """Forget the name; the kernel frees the namespace with its last user. No error if there is none."""
    path = DIRECTORY / name
    _libc.umount2(bytes(path), _MNT_DETACH)  # EINVAL: creation stopped before the mount
    path.unlink(missing_ok=True)


def names(prefix: str) -> list[str]:
    """The namespaces whose name starts so, sorted."""
    if not DIRECTORY.is_dir():
        return []
    return sorted(path.name for path in DIRECTORY.iterdir() if path.name.startswith(prefix))


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """The calling thread is in this namespace for the length of the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", there, _CLONE_NEWNET)
            yield
        finally:
            _call("setns", home, _CLONE_NEWNET)
            os.close(there)
    finally:
        os.close(home)


def open_socket(path: Path, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that lives in this namespace, for use from anywhere. The caller closes it."""
    with inside(path):
        return socket.socket(family, kind, protocol)


def _share_directory() -> None:
    """Make /run/netns a shared mount, as `ip netns add` does, so that other mount namespaces follow it."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    directory = bytes(DIRECTORY)
    try:
        _call("mount", b"", directory, b"none", _MS_SHARED | _MS_REC, None)
    except OSError:  # not a mount point yet
        _call("mount", directory, directory, b"none", _MS_BIND | _MS_REC, None)
        _call("mount", b"", directory, b"none", _MS_SHARED | _MS_REC, None)


def _call(function: str, *arguments: int | bytes | None) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
