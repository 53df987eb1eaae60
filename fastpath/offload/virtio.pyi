from typing import NamedTuple

from fastpath.drops import DropReason

class VirtioHeader(NamedTuple):
    """struct virtio_net_hdr of linux/virtio_net.h, little endian (TUNSETVNETLE or a little-endian host)."""

    flags: int
    gso_type: int
    header_length: int
    gso_size: int
    checksum_start: int
    checksum_offset: int

def decode(header: bytes) -> VirtioHeader: ...
def encode(header: VirtioHeader) -> bytes: ...
def complete_checksum(header: VirtioHeader, frame: bytes) -> bytes | DropReason:
    """The frame with its partial (NEEDS_CSUM) checksum finished, or VIRTIO_HEADER if the header does
    not fit its frame. A frame whose header asks for nothing comes back as it is."""
