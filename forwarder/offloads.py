"""What makes the data plane faster, most of it by the kernel's help, each a switch: the names, and what is
said of one that is off.

Pure. An offload is on if it is wanted and the kernel has not refused it; nothing but speed depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ABOUT: Final = {
    "tso": "TCP superframes from the TAP",
    "uso": "UDP superframes from the TAP (Linux 6.2)",
    "udp_segment": "one send for a run of datagrams (UDP_SEGMENT)",
    "udp_gro": "one receive for a train of datagrams (UDP_GRO)",
    "merge_tcp": "TCP merged to superframes on the way to the TAP",
    "merge_udp": "UDP merged to superframes on the way to the TAP (Linux 6.2)",
    "uplink": "TCP superframes cut by the kernel inside their tunnel (UDP tunnel GSO, Linux 6.17)",
    "threaded_napi": "a kernel thread behind the TAP while bytes move in bulk (Linux 5.12)",
    "spin": "a short look for the next packet before sleeping, while packets follow closely",
}

SWITCHED_OFF: Final = "switched off"


@dataclass(frozen=True, slots=True)
class Offload:
    """`reason` says why it is off, and is None when it is on."""

    on: bool
    reason: str | None


def judge(wanted: bool, refusal: str | None) -> Offload:
    if not wanted:
        return Offload(False, SWITCHED_OFF)
    return Offload(refusal is None, refusal)
