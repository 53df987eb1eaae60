from typing import Final

VNET_HEADER_SIZE: Final[int]
TUNNEL_VNET_HEADER_SIZE: Final[int]

def set_vnet_header_size(fd: int, size: int) -> None:
    """TUNSETVNETHDRSZ. OSError as the kernel says."""

def set_offloads(fd: int, *, checksum: bool, tso: bool, uso: bool, udp_tunnel: bool = False) -> None:
    """TUNSETOFFLOAD with the named bits and no others. OSError EINVAL if the kernel lacks one."""
