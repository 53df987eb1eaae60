def merge(frames: list[bytes], *, tcp: bool = True, udp: bool = True) -> list[tuple[bytes, bytes]]:
    """One batch of untagged IP frames -> [(virtio_net_hdr, frame)], as they would be written to a TAP:
    superframes where the rules allow, in the order in which each began. ValueError on a frame that
    classify() refuses."""
