from fastpath.drops import DropReason

def cut(header: bytes, frame: bytes) -> list[bytes] | DropReason:
    """The frames that the superframe behind this virtio_net_hdr stands for, each with complete
    checksums, as the kernel's GSO would cut it; VIRTIO_HEADER if header and frame do not agree."""
