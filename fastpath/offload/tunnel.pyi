from fastpath.drops import DropReason

def wrap(
    header: bytes,
    frame: bytes,
    *,
    tunnel: bytes,
    source: bytes,
    source_port: int,
    destination: bytes,
    destination_port: int,
    uplink_mac: bytes,
    ecn: int = 0,
) -> bytes | DropReason:
    """What is written to an uplink for the TCP superframe behind this virtio_net_hdr: the 24-byte header
    of UDP tunnel GSO, Ethernet, IP, UDP, the 8 bytes of `tunnel` and the frame; or the drop reason.
    Addresses are packed."""
