"""sysfs as the network namespace of the calling thread has it. What is mounted on /sys may be another one's,
or read-only, as in a container; so it is mounted anew for each call, and nowhere (fsopen(2), Linux 5.2)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

# asm-generic/unistd.h: the same numbers on every architecture; linux/mount.h
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8

_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """An attribute, as of "class/net/lo/threaded", opened with os.O_RDONLY or os.O_WRONLY. OSError as the
    kernel says; it takes CAP_SYS_ADMIN."""
    with ExitStack() as stack:
        context = _call(FSOPEN, ctypes.c_char_p(b"sysfs"), FSOPEN_CLOEXEC)
        stack.callback(os.close, context)
        _call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        root = _call(FSMOUNT, context, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID_NODEV_NOEXEC)
        stack.callback(os.close, root)
        attribute = os.open(path, flags | os.O_CLOEXEC, dir_fd=root)
        stack.callback(os.close, attribute)
        yield attribute


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
