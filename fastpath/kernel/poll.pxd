# Waiting for the data plane's descriptors: one epoll set, which an event loop can watch as a whole.

from libc.stdint cimport int64_t

from fastpath.linux cimport (
    CLOCK_MONOTONIC,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    EPOLLIN,
    clock_gettime,
    close,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_pwait2,
    errno,
    sched_yield,
    timespec,
)


cdef enum:
    POLL_EVENTS = 16


cdef inline int poll_open() noexcept nogil:
    """A new set, or -errno."""
    cdef int fd = epoll_create1(EPOLL_CLOEXEC)
    return fd if fd >= 0 else -errno


cdef inline void poll_close(int poll_fd) noexcept nogil:
    close(poll_fd)


cdef inline int poll_add(int poll_fd, int fd) noexcept nogil:
    """Watch a descriptor for reading; 0 or -errno."""
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.fd = fd
    return 0 if epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event) == 0 else -errno


cdef inline void poll_remove(int poll_fd, int fd) noexcept nogil:
    """Watch it no more; nothing to do if it was not."""
    cdef epoll_event event
    epoll_ctl(poll_fd, EPOLL_CTL_DEL, fd, &event)


cdef inline int poll_wait(int poll_fd, epoll_event *events, long microseconds) noexcept nogil:
    """How many of POLL_EVENTS events came in the time, or -errno; -ENOSYS before Linux 5.11."""
    cdef timespec timeout
    cdef int n
    timeout.tv_sec = 0
    timeout.tv_nsec = microseconds * 1000
    n = epoll_pwait2(poll_fd, events, POLL_EVENTS, &timeout, NULL)
    return n if n >= 0 else -errno


cdef inline void poll_yield() noexcept nogil:
    """Let another thread that waits for this CPU have it."""
    sched_yield()


cdef inline int64_t poll_clock() noexcept nogil:
    """Nanoseconds since some moment, for telling how long a wait took."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec
