# Every declaration from libc and kernel headers. No function of ours lives here.

from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EAFNOSUPPORT
        EAGAIN
        EINTR
        EINVAL
        EBADFD
        EIO
        EMSGSIZE
        ENOBUFS
        ENOMEM
        ENOSYS


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

    enum:
        CLOCK_MONOTONIC

    int clock_gettime(int clock, timespec *now)


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        int fd

    struct epoll_event:
        uint32_t events
        epoll_data data

    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLLIN

    int epoll_create1(int flags)
    int epoll_ctl(int poll_fd, int operation, int fd, epoll_event *event)
    int epoll_pwait2(int poll_fd, epoll_event *events, int count, const timespec *timeout, const void *mask)


cdef extern from "<sys/types.h>" nogil:
    ctypedef long ssize_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t writev(int fd, const iovec *iov, int count)


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buffer, size_t count)
    int close(int fd)


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t

    struct sockaddr:
        unsigned short sa_family

    struct sockaddr_storage:
        unsigned short ss_family

    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type

    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *control)
    unsigned char *CMSG_DATA(cmsghdr *control)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)

    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, void *timeout)
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)

    enum:
        AF_INET
        AF_INET6
        MSG_DONTWAIT
        MSG_TRUNC
        MSG_CTRUNC


cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr

    struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr

    struct in6_addr:
        uint8_t s6_addr[16]

    struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id

    enum:
        IPPROTO_IP
        IPPROTO_IPV6
        IPPROTO_UDP
        IP_TOS
        IPV6_TCLASS


cdef extern from "<linux/udp.h>" nogil:
    enum:
        UDP_SEGMENT
        UDP_GRO


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<linux/if_tun.h>" nogil:
    enum:
        TUNSETVNETHDRSZ
        TUNSETOFFLOAD
        TUN_F_CSUM
        TUN_F_TSO4
        TUN_F_TSO6
        TUN_F_TSO_ECN


cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr:
        uint8_t flags
