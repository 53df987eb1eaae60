"""Runs one CNI call in a process of its own, and kills that at its n-th system call or makes that call fail.

`python -m tests.cni.stepper`: a line of JSON in, {"how", "env", "stdin", "state_dir", "at", "errno"};
a line out, {"points": system calls it got to, "exit": the call's exit code or null when it was killed}.
With an errno, only calls to the disk and to the kernel's networking count; the n-th of them fails with it.
A process that has everything imported is forked for each call, so that a call costs milliseconds.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cni import install, plugin
from cni.service import CniService
from tests.cni.conftest import NETWORK

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200  # sys/ptrace.h
_SYSGOOD, _TRACECLONE, _EXITKILL = 0x1, 0x8, 0x100000
_WALL = 0x40000000  # linux/wait.h
_SYSCALL_STOP = signal.SIGTRAP | 0x80

# x86-64: where struct user of sys/user.h has these registers, and (asm/unistd_64.h) the numbers of write,
# ioctl, pwrite64, socket, sendto, recvfrom, bind, setsockopt, fsync, fdatasync, ftruncate, mkdir, unlink,
# openat, setns and bpf
FALLIBLE = frozenset({1, 16, 18, 41, 44, 45, 49, 54, 74, 75, 77, 83, 87, 257, 308, 321})
_PEEKUSER, _POKEUSER, _ORIG_RAX, _RAX = 3, 6, 15 * 8, 10 * 8
_NO_CALL = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: int = 0, at: int | None = None) -> int:
    ctypes.set_errno(0)
    value: int = _libc.ptrace(request, pid, at, data)
    if value < 0 and (error := ctypes.get_errno()):
        raise OSError(error, os.strerror(error))
    return value


def serve() -> None:
    for line in sys.stdin:
        points, exit_code = stepped(json.loads(line))
        sys.stdout.write(json.dumps({"points": points, "exit": exit_code}) + "\n")
        sys.stdout.flush()


def stepped(call: dict[str, Any]) -> tuple[int, int | None]:
    child = os.fork()
    if child == 0:
        answer(call)
    os.waitpid(child, 0)
    ptrace(_SETOPTIONS, child, _SYSGOOD | _TRACECLONE | _EXITKILL)
    points, inside, killed, errno = 0, set[int](), False, call.get("errno", 0)
    failing: set[int] = set()
    ptrace(_SYSCALL, child)
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == child:
                return points, os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            continue
        deliver = 0
        if os.WSTOPSIG(status) == _SYSCALL_STOP:
            entering = thread not in inside
            (inside.add if entering else inside.discard)(thread)
            if thread in failing and not entering:
                failing.discard(thread)
                ptrace(_POKEUSER, thread, (1 << 64) - errno, _RAX)
            if entering and (not errno or ptrace(_PEEKUSER, thread, at=_ORIG_RAX) in FALLIBLE):
                points += 1
                if points == call["at"] and errno:
                    failing.add(thread)
                    ptrace(_POKEUSER, thread, _NO_CALL, _ORIG_RAX)
                elif points == call["at"]:
                    killed = True
                    os.kill(child, signal.SIGKILL)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
        try:
            ptrace(_SYSCALL, thread, deliver)
        except ProcessLookupError:
            if not killed:
                raise


def answer(call: dict[str, Any]) -> None:
    """The child: opens what a daemon has open already, then is stepped through the call."""
    env, stdin = call["env"], call["stdin"]
    if call["how"] == "service":
        service = CniService(NETWORK, Path(call["state_dir"]))
        service.handle({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "warm", "CNI_IFNAME": "eth0"}, stdin)
    ptrace(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    if call["how"] == "service":
        exit_code, _ = service.handle(env, stdin)
    elif call["how"] == "install":
        install.install(Path(call["state_dir"]) / "bin", Path(call["state_dir"]) / "conf")
        exit_code = 0
    else:
        exit_code, _, _ = plugin.run(env, io.BytesIO(stdin.encode()))
    os._exit(exit_code)


if __name__ == "__main__":
    serve()
