"""The daemon's UDP sockets. Descriptors, not socket objects: the pump borrows them."""

import socket

from cpython.exc cimport PyErr_SetFromErrno

from fastpath.linux cimport setsockopt

# linux/in.h, linux/in6.h; the socket module does not name them all on every Python.
cdef enum:
    IP_MTU_DISCOVER = 10
    IP_PMTUDISC_DO = 2
    IPV6_MTU_DISCOVER = 23
    IPV6_PMTUDISC_DO = 2
    SO_SNDBUFFORCE = 32
    SO_RCVBUFFORCE = 33


def open_receiver(address: str, port: int, *, receive_buffer_bytes: int = 7 << 20, gro: bool = True) -> int:
    """A bound non-blocking UDP socket which reports each datagram's outer ToS. What is sent from it is
    never fragmented either."""
    sock = bound(address, port)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        never_fragment(sock)
        if gro:
            set_gro(sock.fileno(), True)
        grow(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_buffer_bytes)
    except BaseException:
        sock.close()
        raise
    return sock.detach()


def open_sender(address: str, *, send_buffer_bytes: int = 7 << 20) -> int:
    """A non-blocking UDP socket on a port of the kernel's choice; it never fragments the outer packet."""
    sock = bound(address, 0)
    try:
        never_fragment(sock)
        grow(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, send_buffer_bytes)
    except BaseException:
        sock.close()
        raise
    return sock.detach()


def set_gro(int fd, bint on):
    """UDP_GRO: whether a train of equal datagrams may arrive as one. OSError as the kernel says."""
    cdef int value = on
    if setsockopt(fd, IPPROTO_UDP, UDP_GRO, &value, sizeof(value)) < 0:
        PyErr_SetFromErrno(OSError)


def bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def never_fragment(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)


def grow(sock: socket.socket, force: int, polite: int, size: int) -> None:
    """Ask past the sysctl's limit, which takes CAP_NET_ADMIN; without it take what is given."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, polite, size)
