from typing import ClassVar

from typing_extensions import Buffer

from fastpath.table import PrefixTable

class Packets:
    """A batch of frames or datagrams in memory of its own."""

    count: int
    def __init__(self, packets: list[bytes]) -> None: ...

def decode(datagrams: Packets, encapsulation: str, passes: int) -> int:
    """Sum of header length and VNI over all datagrams."""

def encode(encapsulation: str, count: int) -> bytes:
    """Headers of VNI 0, 1, 2 and so on; the last of them."""

def classify(frames: Packets, passes: int) -> int:
    """Sum of the flow hashes."""

def checksum(data: Buffer, passes: int) -> int:
    """Sum of the folded sums."""

def complete_checksums(frames: Packets, header: bytes, passes: int) -> int:
    """Finish the partial checksum of each frame behind the same virtio_net_hdr; the first frame's field."""

def lookup(table: PrefixTable, addresses: memoryview, passes: int) -> int:
    """Sum of the slots that addresses of 4 or 16 bytes, a row each, lead to."""

def segment(superframe: Packets, header: bytes, partial: bool, passes: int) -> int:
    """The headers of every segment that the one superframe is cut into; how many segments. `partial` leaves
    their checksums unfinished."""

class Merger:
    """The chains of coalescing, without the TAP behind them."""

    def merge(self, frames: Packets, passes: int) -> int:
        """Merge the batch and take it apart again; how many frames would have been written."""

def plan(keys: Buffer, lengths: Buffer, passes: int) -> int:
    """Datagrams to runs; how many runs. Both are arrays of 32-bit words."""

class Transfer:
    """Datagrams of one size from one UDP socket to another on this machine."""

    datagrams: ClassVar[int]
    def __init__(self, sender: int, receiver: int, address: bytes, port: int, size: int) -> None: ...
    def run(self, gso: bool, mmsg: bool) -> int:
        """Send them, then receive them; how many bytes arrived."""
