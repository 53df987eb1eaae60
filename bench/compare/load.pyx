"""Offered load and its measurement, over sockets that were opened wherever they are wanted.

Each function runs without the GIL and is bounded in time, so a thread each for sender and receiver is as
good as a process, and the sender is not held up by an interpreter.
"""

from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcpy, memset

from fastpath.linux cimport MSG_DONTWAIT, iovec, mmsghdr, recvmmsg, sendmmsg


cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    struct timespec:
        long tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
        TIMER_ABSTIME
    int clock_gettime(clockid_t clock, timespec *now)
    int clock_nanosleep(clockid_t clock, int flags, const timespec *until, timespec *left)


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int poll(pollfd *fds, unsigned long count, int milliseconds)


cdef extern from "<sys/types.h>" nogil:
    ctypedef long ssize_t


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    ssize_t send(int fd, const void *data, size_t length, int flags)
    ssize_t recv(int fd, void *data, size_t length, int flags)
    ssize_t recvfrom(int fd, void *data, size_t length, int flags, sockaddr *name, socklen_t *size)
    ssize_t sendto(int fd, const void *data, size_t length, int flags, const sockaddr *name, socklen_t size)


cdef enum:
    BATCH = 64
    SECOND = 1_000_000_000
    BURST = SECOND // 2000      # what is sent at once at a rate: half a millisecond's worth
    DATAGRAM_BYTES = 65536
    ANSWER = SECOND // 5        # an answer that takes longer counts as lost
    SAMPLES = 2_000_000


cdef inline int64_t clock() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * SECOND + now.tv_nsec


cdef inline void sleep_until(int64_t when) noexcept nogil:
    cdef timespec until
    until.tv_sec = when // SECOND
    until.tv_nsec = when % SECOND
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)


cdef int wait_readable(int fd, int64_t nanoseconds) noexcept nogil:
    cdef pollfd one
    one.fd = fd
    one.events = POLLIN
    one.revents = 0
    return poll(&one, 1, <int> ((nanoseconds + 999_999) // 1_000_000))


def offer(int fd, int size, double rate, double seconds):
    """Send datagrams of `size` bytes from a connected socket by plain sendmmsg, each a packet of its own, at
    `rate` a second or as fast as it goes (0); (sent, seconds it took)."""
    cdef uint8_t payload[DATAGRAM_BYTES]
    cdef mmsghdr messages[BATCH]
    cdef iovec piece
    cdef int64_t began, end, now
    cdef int64_t sent = 0
    cdef int batch = BATCH
    cdef int count = 0
    cdef int i
    if not 0 < size <= DATAGRAM_BYTES:
        raise ValueError(f"size: {size} is not in 1..{DATAGRAM_BYTES}")
    memset(payload, 0x5A, size)
    memset(messages, 0, sizeof(messages))
    piece.iov_base = payload
    piece.iov_len = size
    for i in range(BATCH):
        messages[i].msg_hdr.msg_iov = &piece
        messages[i].msg_hdr.msg_iovlen = 1
    if rate:
        batch = max(1, min(BATCH, <int> (rate * BURST / SECOND)))
    with nogil:
        began = now = clock()
        end = began + <int64_t> (seconds * SECOND)
        while now < end:
            count = sendmmsg(fd, messages, batch, 0)
            if count < 0 and errno != ENOBUFS and errno != EAGAIN and errno != EINTR:
                break
            sent += max(count, 0)
            if rate:
                sleep_until(began + <int64_t> (sent * SECOND / rate))
            now = clock()
        if count < 0:
            count = -errno
    if count < 0 and -count not in (ENOBUFS, EAGAIN, EINTR):
        raise OSError(-count, "offering load")
    return sent, (now - began) / <double> SECOND


def count(int fd, int stop_fd, double idle_seconds, double seconds):
    """Receive from a bound socket until `stop_fd` is readable and then nothing has come for `idle_seconds`,
    or for `seconds` at most; how many datagrams came."""
    cdef uint8_t *buffers = <uint8_t *> calloc(BATCH, 2048)
    cdef mmsghdr messages[BATCH]
    cdef iovec pieces[BATCH]
    cdef pollfd fds[2]
    cdef int64_t received = 0
    cdef int64_t end, patience
    cdef int n, i
    cdef bint stopping = False
    if buffers == NULL:
        raise MemoryError
    memset(messages, 0, sizeof(messages))
    for i in range(BATCH):
        pieces[i].iov_base = buffers + i * 2048
        pieces[i].iov_len = 2048
        messages[i].msg_hdr.msg_iov = &pieces[i]
        messages[i].msg_hdr.msg_iovlen = 1
    fds[0] = pollfd(fd, POLLIN, 0)
    fds[1] = pollfd(stop_fd, POLLIN, 0)
    with nogil:
        end = clock() + <int64_t> (seconds * SECOND)
        while True:
            patience = min(end - clock(), <int64_t> (idle_seconds * SECOND) if stopping else SECOND)
            if patience <= 0:
                break
            n = poll(fds, 1 if stopping else 2, <int> (patience // 1_000_000))
            if n == 0 and stopping:
                break
            stopping = stopping or fds[1].revents != 0
            if fds[0].revents:
                received += max(recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL), 0)
        free(buffers)
    return received


def echo(int fd, double seconds):
    """Send back whatever a bound socket receives, until a datagram of one byte or for `seconds`."""
    cdef uint8_t buffer[2048]
    cdef uint8_t name[128]
    cdef socklen_t name_size
    cdef int64_t end
    cdef ssize_t n
    with nogil:
        end = clock() + <int64_t> (seconds * SECOND)
        while clock() < end and wait_readable(fd, end - clock()) > 0:
            name_size = sizeof(name)
            n = recvfrom(fd, buffer, sizeof(buffer), MSG_DONTWAIT, <sockaddr *> name, &name_size)
            if n == 1:
                break
            if n > 0:
                sendto(fd, buffer, n, 0, <sockaddr *> name, name_size)


cdef int ascending(const void *a, const void *b) noexcept nogil:
    cdef uint32_t x = (<const uint32_t *> a)[0]
    cdef uint32_t y = (<const uint32_t *> b)[0]
    return (x > y) - (x < y)


cdef inline uint16_t internet_checksum(const uint8_t *data, int length) noexcept nogil:
    cdef uint32_t total = 0
    cdef uint16_t word
    cdef int i
    for i in range(0, length, 2):
        memcpy(&word, data + i, 2)
        total += word
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return <uint16_t> ~total


cdef enum:
    ICMP_ECHO = 8               # RFC 792
    ICMP_HEADER = 8
    IPV4_HEADER = 20            # what a raw socket puts before each message; replies carry no options


cdef void write_request(uint8_t *message, int size, bint icmp, uint32_t sequence) noexcept nogil:
    """A sequence number where the answer brings it back: bytes 4-7 of either kind."""
    cdef uint16_t check
    memset(message, 0, 8)
    memcpy(message + 4, &sequence, 4)
    if icmp:
        message[0] = ICMP_ECHO
        check = internet_checksum(message, size)
        memcpy(message + 2, &check, 2)


def ask(int fd, int size, bint icmp, double seconds):
    """One request after the other, each when the last is answered; (answers, lost, p50, p99 in seconds).

    The connected socket is UDP towards an echo(), or raw ICMP: then requests are echo requests of `size`
    bytes from the ICMP header on (even, at least 8), and the far kernel answers."""
    cdef uint8_t message[2048]
    cdef uint8_t answer[2048]
    cdef uint32_t *samples
    cdef uint32_t sequence = 0
    cdef uint32_t got
    cdef int skip = IPV4_HEADER if icmp else 0
    cdef int64_t end, asked, now
    cdef int64_t answers = 0
    cdef int64_t lost = 0
    cdef ssize_t n
    cdef bint answered
    if not 8 <= size <= 1400 or size % 2:
        raise ValueError(f"size: {size} is no even number in 8..1400")
    samples = <uint32_t *> calloc(SAMPLES, sizeof(uint32_t))
    if samples == NULL:
        raise MemoryError
    memset(message, 0, sizeof(message))
    with nogil:
        now = clock()
        end = now + <int64_t> (seconds * SECOND)
        while now < end and answers < SAMPLES:
            sequence += 1
            write_request(message, size, icmp, sequence)
            asked = clock()
            answered = False
            if send(fd, message, size, 0) == size:
                while not answered and wait_readable(fd, ANSWER) > 0:
                    n = recv(fd, answer, sizeof(answer), MSG_DONTWAIT)
                    if n >= skip + 8 and not (icmp and answer[skip] != 0):
                        memcpy(&got, answer + skip + 4, 4)
                        answered = got == sequence
                    if clock() - asked > ANSWER:
                        break
            now = clock()
            if answered:
                samples[answers] = <uint32_t> (now - asked)
                answers += 1
            else:
                lost += 1
        qsort(samples, answers, sizeof(uint32_t), ascending)
    try:
        if answers == 0:
            return 0, lost, 0.0, 0.0
        return (
            answers,
            lost,
            samples[answers // 2] / <double> SECOND,
            samples[answers * 99 // 100] / <double> SECOND,
        )
    finally:
        free(samples)
