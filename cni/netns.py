"""Work in another network namespace without ever being stuck in it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns came only with Python 3.12


def is_netns(fd: int) -> bool:
    """Whether `fd` is a network namespace: the kernel says so itself (ioctl_ns(2))."""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def is_own(netns_fd: int) -> bool:
    """Whether `netns_fd` is the namespace of this very thread."""
    return os.path.samestat(os.fstat(netns_fd), Path("/proc/thread-self/ns/net").stat())


def call_in(netns_fd: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args)` on a thread of its own that lives in `netns_fd`; its exception is raised here.

    The thread ends there, so there is no way back that could fail. Sockets it opens stay in that namespace.
    """
    outcome: list[R] = []
    failure: list[BaseException] = []

    def enter_and_call() -> None:
        try:
            if _libc.setns(netns_fd, _CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, f"setns: {os.strerror(error)}")
            outcome.append(function(*args, **kwargs))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=enter_and_call, name="in-netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
