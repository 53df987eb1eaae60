def open_receiver(address: str, port: int, *, receive_buffer_bytes: int = ..., gro: bool = ...) -> int:
    """A bound non-blocking UDP socket, IPv4 or IPv6 by the address's form, which reports the outer
    ToS (IP_RECVTOS / IPV6_RECVTCLASS). The caller closes it. OSError as the kernel says."""

def open_sender(address: str, *, send_buffer_bytes: int = ...) -> int:
    """A non-blocking UDP socket bound to the address and a port of the kernel's choice, with
    the outer packet never fragmented (IP_PMTUDISC_DO). The caller closes it."""

def set_gro(fd: int, on: bool) -> None:
    """UDP_GRO: whether a train of equal datagrams may arrive as one. OSError as the kernel says."""
