"""sysfs as the network namespace of the calling thread has it. What is mounted on /sys may be another one's,
or read-only, as in a container; so it is mounted anew for each call, and nowhere (fsopen(2), Linux 5.2)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# asm-generic/unistd.h: the same numbers on every architecture; linux/mount.h
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8

_libc: Final = ctypes.CDLL(None, use_errno=True)


def read(path: str) -> str:
    """An attribute, without its newline. OSError as the kernel says."""
    with _mounted() as root:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        try:
            return os.read(descriptor, 4096).decode().strip()
        finally:
            os.close(descriptor)


def write(path: str, value: str) -> None:
    """Set an attribute, as of "class/net/lo/threaded". OSError as the kernel says; it takes CAP_SYS_ADMIN."""
    with _mounted() as root:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)


@contextmanager
def _mounted() -> Iterator[int]:
    """The root of a sysfs that is mounted nowhere, as a descriptor."""
    context = _call(FSOPEN, ctypes.c_char_p(b"sysfs"), FSOPEN_CLOEXEC)
    try:
        _call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        root = _call(FSMOUNT, context, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
