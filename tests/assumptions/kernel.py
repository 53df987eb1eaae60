"""The few kernel numbers and calls that Python's library does not name, and links to ask them of."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any

from forwarder.demo import netns
from forwarder.demo.lab import link_index, netlink

# linux/if_tun.h
TUNSETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD = 0x400454CA, 0x400454D8, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40

# linux/virtio_net.h: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
VIRTIO_HEADER = struct.Struct("<BBHHHH")
NEEDS_CSUM = 1
GSO_NONE = 0

# linux/udp.h, linux/in.h, linux/in6.h, asm-generic/socket.h
UDP_SEGMENT, UDP_GRO = 103, 104
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2
SO_NO_CHECK = 11

# linux/neighbour.h, linux/if_addr.h
NUD_NOARP, NUD_PERMANENT, NTF_MASTER = 0x40, 0x80, 0x04
NODAD = {"flags": 0x02}


def open_tap(namespace: Path, name: str = "tap", *, vnet_header: bool = True) -> int:
    """A TAP descriptor, non-blocking. The caller closes it."""
    with netns.inside(namespace):
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return tap


def set_vnet_header_size(tap: int, size: int) -> None:
    fcntl.ioctl(tap, TUNSETVNETHDRSZ, struct.pack("i", size))


def set_offloads(tap: int, offloads: int) -> None:
    fcntl.ioctl(tap, TUNSETOFFLOAD, offloads)


def veth(one: Path, other: Path, network: tuple[str, str], length: int, mtu: int = 1500) -> None:
    """A veth pair, `eth0` in both namespaces, with one address each."""
    with netlink(one) as ip, other.open("rb") as there:
        peer = {"ifname": "eth0", "mtu": mtu, "net_ns_fd": there.fileno()}
        # With one number at both ends, the kernel would take its time (a second) to notice the carrier.
        ip.link("add", ifname="eth0", index=100, kind="veth", mtu=mtu, peer=peer)
    for namespace, address in zip((one, other), network, strict=True):
        set_up(namespace, "eth0", address, length)


def set_up(namespace: Path, name: str, address: str | None = None, length: int = 0, **link: Any) -> None:
    with netlink(namespace) as ip:
        index = link_index(ip, name)
        if address is not None:
            flags = NODAD if ":" in address else {}
            ip.addr("add", index=index, address=address, prefixlen=length, **flags)
        ip.link("set", index=index, state="up", **link)


def link_address(namespace: Path, name: str) -> str:
    with netlink(namespace) as ip:
        (link,) = ip.get_links(link_index(ip, name))
        return str(link.get_attr("IFLA_ADDRESS"))


def disable_ipv6(namespace: Path) -> None:
    """No router solicitations and no MLD in between what a test looks at."""
    with netns.inside(namespace):
        for which in ("default", "all"):
            Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")


def udp_socket(namespace: Path, address: str, port: int = 0) -> socket.socket:
    """A bound UDP socket with a deadline on every call. The caller closes it."""
    opened = netns.open_socket(
        namespace, socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
    )
    opened.bind((address, port))
    opened.settimeout(5)
    return opened


def read_frames(tap: int, count: int, seconds: float = 5) -> list[bytes]:
    """The next `count` frames, header and all; fewer when the time is over."""
    frames: list[bytes] = []
    deadline = time.monotonic() + seconds
    while len(frames) < count and (left := deadline - time.monotonic()) > 0:
        if select.select([tap], [], [], left)[0]:
            frames.append(os.read(tap, 1 << 17))
    return frames
