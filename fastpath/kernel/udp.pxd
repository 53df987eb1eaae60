# Batches of datagrams in and out, and the only code that reads or writes their control messages.
# What belongs together in a batch, and what a failure means, is decided elsewhere.

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from fastpath.linux cimport (
    AF_INET,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    CMSG_SPACE,
    IP_TOS,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_TCLASS,
    MSG_DONTWAIT,
    MSG_TRUNC,
    UDP_GRO,
    UDP_SEGMENT,
    cmsghdr,
    errno,
    iovec,
    mmsghdr,
    msghdr,
    recvmmsg,
    sendmmsg,
    sockaddr_in,
    sockaddr_in6,
    sockaddr_storage,
    socklen_t,
)


cdef enum:
    BATCH = 64             # messages in one recvmmsg or sendmmsg
    RECEIVE_BYTES = 65536  # no UDP datagram, nor a GRO train of them, is longer
    # Buffers lie further apart than a power of two, so that their heads share no cache set.
    RECEIVE_STRIDE = RECEIVE_BYTES + 2112
    CONTROL_BYTES = 64


cdef struct Received:
    uint8_t *data            # borrowed: until the next receive into the batch
    uint32_t length
    uint32_t segment         # bytes of each datagram but the last of a GRO train; else `length`
    const uint8_t *source    # outer address, 4 or 16 bytes
    const void *source_port  # in network order
    int family
    uint8_t tos              # outer ToS or Traffic Class
    bint truncated


cdef struct ReceiveBatch:
    mmsghdr messages[BATCH]
    iovec pieces[BATCH]
    sockaddr_storage names[BATCH]
    uint8_t control[BATCH][CONTROL_BYTES]
    uint8_t *buffers         # BATCH * RECEIVE_STRIDE bytes


cdef struct SendBatch:
    mmsghdr messages[BATCH]
    uint8_t control[BATCH][CONTROL_BYTES]


cdef inline int receive_batch(int fd, ReceiveBatch *batch, int count) noexcept nogil:
    """Messages received, or -errno. Everything the kernel writes to is reset first."""
    cdef msghdr *header
    cdef int i
    for i in range(count):
        header = &batch.messages[i].msg_hdr
        batch.pieces[i].iov_base = batch.buffers + <size_t> i * RECEIVE_STRIDE
        batch.pieces[i].iov_len = RECEIVE_BYTES
        header.msg_name = &batch.names[i]
        header.msg_namelen = sizeof(sockaddr_storage)
        header.msg_iov = &batch.pieces[i]
        header.msg_iovlen = 1
        header.msg_control = batch.control[i]
        header.msg_controllen = CONTROL_BYTES
        header.msg_flags = 0
    i = recvmmsg(fd, batch.messages, count, MSG_DONTWAIT, NULL)
    return i if i >= 0 else -errno


cdef inline Received received(ReceiveBatch *batch, int i) noexcept nogil:
    cdef msghdr *header = &batch.messages[i].msg_hdr
    cdef cmsghdr *control = CMSG_FIRSTHDR(header)
    cdef Received message
    cdef int value
    message.data = <uint8_t *> batch.pieces[i].iov_base
    message.length = batch.messages[i].msg_len
    message.segment = message.length
    message.truncated = header.msg_flags & MSG_TRUNC != 0
    message.tos = 0
    message.family = batch.names[i].ss_family
    if message.family == AF_INET:
        message.source = <const uint8_t *> &(<sockaddr_in *> &batch.names[i]).sin_addr
        message.source_port = &(<sockaddr_in *> &batch.names[i]).sin_port
    else:
        message.source = <const uint8_t *> &(<sockaddr_in6 *> &batch.names[i]).sin6_addr
        message.source_port = &(<sockaddr_in6 *> &batch.names[i]).sin6_port
    while control != NULL:
        if control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_TOS:
            message.tos = CMSG_DATA(control)[0]
        elif control.cmsg_level == IPPROTO_IPV6 and control.cmsg_type == IPV6_TCLASS:
            memcpy(&value, CMSG_DATA(control), sizeof(value))
            message.tos = <uint8_t> value
        elif control.cmsg_level == IPPROTO_UDP and control.cmsg_type == UDP_GRO:
            memcpy(&value, CMSG_DATA(control), sizeof(value))
            if 0 < value < <int> message.length:
                message.segment = value
        control = CMSG_NXTHDR(header, control)
    return message


cdef inline void send_put(
    msghdr *header, cmsghdr **at, int level, int kind, const void *value, size_t size
) noexcept nogil:
    at[0].cmsg_level = level
    at[0].cmsg_type = kind
    at[0].cmsg_len = CMSG_LEN(size)
    memcpy(CMSG_DATA(at[0]), value, size)
    header.msg_controllen += CMSG_SPACE(size)
    at[0] = <cmsghdr *> (<uint8_t *> at[0] + CMSG_SPACE(size))


cdef inline void send_describe(
    SendBatch *batch,
    int i,
    sockaddr_storage *name,
    socklen_t name_length,
    iovec *pieces,
    size_t count,
    uint16_t segment,
    int tos,
) noexcept nogil:
    """Fill message i. `segment` 0 means one datagram, else UDP_SEGMENT cuts it in that size."""
    cdef msghdr *header = &batch.messages[i].msg_hdr
    cdef cmsghdr *at = <cmsghdr *> batch.control[i]
    header.msg_name = name
    header.msg_namelen = name_length
    header.msg_iov = pieces
    header.msg_iovlen = count
    header.msg_control = batch.control[i]
    header.msg_controllen = 0
    header.msg_flags = 0
    if segment:
        send_put(header, &at, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment))
    if tos and name.ss_family == AF_INET:
        send_put(header, &at, IPPROTO_IP, IP_TOS, &tos, sizeof(tos))
    elif tos:
        send_put(header, &at, IPPROTO_IPV6, IPV6_TCLASS, &tos, sizeof(tos))


cdef inline int send_batch(int fd, SendBatch *batch, int first, int count) noexcept nogil:
    """Messages sent, fewer than asked if one failed behind them; -errno if the first failed."""
    cdef int sent = sendmmsg(fd, &batch.messages[first], count, MSG_DONTWAIT)
    return sent if sent >= 0 else -errno
