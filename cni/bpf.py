"""The bpf system call: load a traffic control program and hang it on a link's ingress.

Kernels from 6.6 on have tcx, which leaves the link's qdiscs to others; before that it is a filter of a clsact
qdisc. Either way the kernel drops the program with the link. Source: linux/bpf.h, bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

NAME = "podloom_guard"
"""The program's name in the kernel; at most 15 bytes (BPF_OBJ_NAME_LEN)."""

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
_PROG_LOAD, _PROG_ATTACH, _PROG_TEST_RUN, _PROG_QUERY = 5, 8, 10, 16
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 13, 15
_SCHED_CLS, _TCX_INGRESS = 3, 46
_INSTRUCTION_BYTES = 8
_PROGRAMS_MAX = 64  # BPF_MPROG_MAX
_INFO_NAME = slice(64, 80)  # of struct bpf_prog_info

_libc = ctypes.CDLL(None, use_errno=True)


class BpfError(OSError):
    """The kernel refused; the text is what was asked."""


def load(program: bytes) -> int:
    """The loaded program's descriptor; its caller closes it."""
    instructions, license_text = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        _SCHED_CLS,
        len(program) // _INSTRUCTION_BYTES,
        ctypes.addressof(instructions),
        ctypes.addressof(license_text),
        0,
        0,
        0,
        0,
        0,
        NAME.encode(),
    )
    return _bpf(_PROG_LOAD, attributes, "load the anti-spoofing program")


def attach_tcx(program_fd: int, index: int) -> bool:
    """Attach to link `index` of this thread's namespace; False where the kernel has no tcx."""
    try:
        _bpf(_PROG_ATTACH, struct.pack("=IIII", index, program_fd, _TCX_INGRESS, 0), "attach to tcx")
    except BpfError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def attached_to_tcx(index: int) -> bool:
    """Whether a program of our NAME is at the ingress of link `index`."""
    ids = (ctypes.c_uint32 * _PROGRAMS_MAX)()
    query = struct.pack("=IIIIQII", index, _TCX_INGRESS, 0, 0, ctypes.addressof(ids), _PROGRAMS_MAX, 0)
    attributes = ctypes.create_string_buffer(query.ljust(64, b"\0"), 64)
    try:
        _bpf(_PROG_QUERY, attributes, "list tcx programs")
    except BpfError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return any(_name_of(program) == NAME for program in ids if program)


def run(program_fd: int, frame: bytes) -> int:
    """What the program answers to `frame` (BPF_PROG_TEST_RUN)."""
    data = ctypes.create_string_buffer(frame, len(frame))
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQQII", program_fd, 0, len(frame), 0, ctypes.addressof(data), 0, 1, 0), 64
    )
    _bpf(_PROG_TEST_RUN, attributes, "run a program")
    answer: int = struct.unpack_from("=i", attributes.raw, 4)[0]
    return answer


def _name_of(program: int) -> str:
    try:
        fd = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", program, 0, 0), "open a program")
    except BpfError as error:
        if error.errno == errno.ENOENT:  # detached meanwhile
            return ""
        raise
    try:
        info = ctypes.create_string_buffer(128)
        _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, 128, ctypes.addressof(info)), "describe a program")
        return info.raw[_INFO_NAME].rstrip(b"\0").decode(errors="replace")
    finally:
        os.close(fd)


def _bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char], what: str) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, f"{what}: podloom does not know bpf(2) on {platform.machine()}")
    result: int = _libc.syscall(number, command, attributes, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError(code, f"{what}: {os.strerror(code)}")
    return result
