"""The TAP's ioctls that python-pytun does not speak (linux/if_tun.h)."""

from cpython.exc cimport PyErr_SetFromErrno

from fastpath.linux cimport (
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUN_F_TSO_ECN,
    TUNSETOFFLOAD,
    TUNSETVNETHDRSZ,
    ioctl,
    virtio_net_hdr,
)

VNET_HEADER_SIZE = sizeof(virtio_net_hdr)
TUNNEL_VNET_HEADER_SIZE = 24  # struct virtio_net_hdr_v1_hash_tunnel, newer than many headers

# TUN_F_USO4 and TUN_F_USO6 came with Linux 6.2: newer than the headers some distributions have.
cdef enum:
    TUN_USO = 0x20 | 0x40


def set_vnet_header_size(int fd, int size):
    """TUNSETVNETHDRSZ. OSError as the kernel says."""
    if ioctl(fd, TUNSETVNETHDRSZ, &size) < 0:
        PyErr_SetFromErrno(OSError)


# TUN_F_UDP_TUNNEL_GSO and TUN_F_UDP_TUNNEL_GSO_CSUM came with Linux 6.17.
cdef enum:
    TUN_UDP_TUNNEL = 0x80 | 0x100


def set_offloads(int fd, *, bint checksum, bint tso, bint uso, bint udp_tunnel=False):
    """TUNSETOFFLOAD with the named bits and no others. OSError EINVAL if the kernel lacks one."""
    cdef unsigned long bits = 0
    if checksum:
        bits |= TUN_F_CSUM
    if tso:
        bits |= TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
    if uso:
        bits |= TUN_USO
    if udp_tunnel:
        bits |= TUN_UDP_TUNNEL
    if ioctl(fd, TUNSETOFFLOAD, bits) < 0:
        PyErr_SetFromErrno(OSError)
