"""One batch through one stage, over and over: what takes nanoseconds cannot be timed from Python.

Everything is prepared by the constructors and returns a figure that tells whether the work was done.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from fastpath.kernel.udp cimport (
    BATCH,
    RECEIVE_STRIDE,
    ReceiveBatch,
    SendBatch,
    receive_batch,
    received,
    send_batch,
    send_describe,
)
from fastpath.linux cimport AF_INET, iovec, sockaddr_in, sockaddr_storage
from fastpath.offload.coalesce cimport (
    BUCKETS,
    NO_CHAIN,
    Coalescer,
    chain_finish,
    chain_restore,
    coalesce_add,
    coalesce_reset,
)
from fastpath.offload.plan cimport RUN_MAX_SEGMENTS, Run, run_accepts, run_begin, run_extend
from fastpath.offload.segment cimport SEGMENT_HEADERS, Superframe, segment_bytes, segment_open, segment_write
from fastpath.offload.virtio cimport VnetHeader, virtio_complete_checksum, virtio_decode
from fastpath.table cimport PrefixTable
from fastpath.wire.checksum cimport sum_add, sum_fold
from fastpath.wire.classify cimport Frame, classify_frame, flow_hash
from fastpath.wire.geneve cimport geneve_decode, geneve_encode
from fastpath.wire.vxlan cimport vxlan_decode, vxlan_encode


cdef enum:
    STRIDE = 65536 + 192    # apart by no power of two, so that heads share no cache set


cdef class Packets:
    """A batch of frames or datagrams in memory of its own."""

    cdef uint8_t *memory
    cdef uint32_t lengths[BATCH]
    cdef Frame infos[BATCH]
    cdef readonly int count

    def __cinit__(self, list packets not None):
        cdef int i
        if not 0 < len(packets) <= BATCH:
            raise ValueError(f"packets: {len(packets)} is not in 1..{BATCH}")
        self.count = len(packets)
        self.memory = <uint8_t *> calloc(self.count, STRIDE)
        if self.memory == NULL:
            raise MemoryError
        for i in range(self.count):
            self.lengths[i] = len(packets[i])
            memcpy(self.at(i), <const uint8_t *> <bytes> packets[i], self.lengths[i])
            classify_frame(self.at(i), self.lengths[i], &self.infos[i])

    def __dealloc__(self):
        free(self.memory)

    cdef inline uint8_t *at(self, int i) noexcept nogil:
        return self.memory + <size_t> i * STRIDE


def decode(Packets datagrams not None, str encapsulation not None, int passes):
    """Sum of header length and VNI over all datagrams."""
    cdef bint geneve = encapsulation == "geneve"
    cdef uint64_t total = 0
    cdef uint32_t vni = 0
    cdef bint partial = False
    cdef int i, _k
    with nogil:
        for _k in range(passes):
            for i in range(datagrams.count):
                if geneve:
                    total += geneve_decode(datagrams.at(i), datagrams.lengths[i], &vni, &partial)
                else:
                    total += vxlan_decode(datagrams.at(i), datagrams.lengths[i], True, &vni)
                total += vni
    return total


def encode(str encapsulation not None, int count):
    """Headers of VNI 0, 1, 2 and so on; the last of them."""
    cdef bint geneve = encapsulation == "geneve"
    cdef uint8_t headers[64][8]
    cdef int i
    with nogil:
        for i in range(count):
            if geneve:
                geneve_encode(headers[i & 63], i)
            else:
                vxlan_encode(headers[i & 63], i)
    return headers[(count - 1) & 63][:8]


def classify(Packets frames not None, int passes):
    """Sum of the flow hashes."""
    cdef uint64_t total = 0
    cdef Frame info
    cdef int i, _k
    with nogil:
        for _k in range(passes):
            for i in range(frames.count):
                if classify_frame(frames.at(i), frames.lengths[i], &info) == 0:
                    total += flow_hash(&info)
    return total


def checksum(const uint8_t[::1] data not None, int passes):
    """Sum of the folded sums."""
    cdef uint64_t total = 0
    cdef size_t length = data.shape[0]
    cdef int _k
    with nogil:
        for _k in range(passes):
            total += sum_fold(sum_add(&data[0], length, _k))
    return total


def complete_checksums(Packets frames not None, bytes header not None, int passes):
    """Finish the partial checksum of each frame behind the same virtio_net_hdr; the first frame's field."""
    cdef VnetHeader offload = virtio_decode(header)
    cdef size_t field = offload.checksum_start + offload.checksum_offset
    cdef uint16_t partial, result
    cdef int i, _k
    for _k in range(passes):
        for i in range(frames.count):
            memcpy(&partial, frames.at(i) + field, 2)
            virtio_complete_checksum(&offload, frames.at(i), frames.lengths[i])
            memcpy(&result, frames.at(i) + field, 2)
            memcpy(frames.at(i) + field, &partial, 2)
    return result


def lookup(PrefixTable table not None, const uint8_t[:, ::1] addresses not None, int passes):
    """Sum of the slots that addresses of 4 or 16 bytes lead to."""
    cdef int64_t total = 0
    cdef bint ipv4 = addresses.shape[1] == 4
    cdef Py_ssize_t i
    cdef int _k
    with nogil:
        for _k in range(passes):
            for i in range(addresses.shape[0]):
                if ipv4:
                    total += table.find4(&addresses[i, 0])
                else:
                    total += table.find6(&addresses[i, 0])
    return total


def segment(Packets superframe not None, bytes header not None, bint partial, int passes):
    """Every segment that the one superframe is cut into; how many segments. `partial` leaves their checksums
    unfinished."""
    cdef VnetHeader offload = virtio_decode(header)
    cdef uint8_t segments[64 * SEGMENT_HEADERS + 65535]
    cdef uint32_t at
    cdef Superframe cut
    cdef uint64_t total = 0
    cdef uint32_t i
    cdef int _k
    with nogil:
        for _k in range(passes):
            if segment_open(&offload, superframe.at(0), &superframe.infos[0], &cut) == 0:
                at = 0
                for i in range(cut.count):
                    segment_write(&cut, i, segments + at, partial)
                    at += segment_bytes(&cut, i)
                total += cut.count
    return total


cdef class Merger:
    """The chains of coalescing, without the TAP behind them."""

    cdef Coalescer *chains

    def __cinit__(self):
        cdef int i
        self.chains = <Coalescer *> calloc(1, sizeof(Coalescer))
        if self.chains == NULL:
            raise MemoryError
        self.chains.tcp = self.chains.udp = True
        for i in range(BUCKETS):
            self.chains.newest[i] = NO_CHAIN

    def __dealloc__(self):
        free(self.chains)

    def merge(self, Packets frames not None, int passes):
        """Merge the batch and take it apart again; how many frames would have been written."""
        cdef uint64_t total = 0
        cdef int i, _k
        with nogil:
            for _k in range(passes):
                for i in range(frames.count):
                    coalesce_add(self.chains, &frames.infos[i], 1, False)
                total += self.chains.count
                for i in range(self.chains.count):
                    if self.chains.chains[i].packets > 1:
                        chain_finish(&self.chains.chains[i])
                        chain_restore(&self.chains.chains[i])
                coalesce_reset(self.chains)
        return total


def plan(const uint32_t[::1] keys not None, const uint32_t[::1] lengths not None, int passes):
    """Datagrams to runs; how many runs."""
    cdef uint64_t total = 0
    cdef Run run
    cdef Py_ssize_t i
    cdef int _k
    with nogil:
        for _k in range(passes):
            memset(&run, 0, sizeof(run))
            run.closed = True
            for i in range(keys.shape[0]):
                if run_accepts(&run, keys[i], lengths[i], RUN_MAX_SEGMENTS):
                    run_extend(&run, lengths[i])
                else:
                    run_begin(&run, keys[i], lengths[i])
                    total += 1
    return total


cdef enum:
    TRANSFER = 128          # datagrams
    TRANSFER_RUN = 32       # of them in one UDP_SEGMENT send


cdef class Transfer:
    """TRANSFER datagrams of one size from one UDP socket to another on this machine."""

    cdef ReceiveBatch *inbox
    cdef SendBatch *outbox
    cdef uint8_t *payload
    cdef sockaddr_storage endpoint
    cdef iovec pieces[BATCH]
    cdef int sender
    cdef int receiver
    cdef int size

    datagrams = TRANSFER

    def __cinit__(self, int sender, int receiver, bytes address not None, int port, int size):
        cdef sockaddr_in *endpoint = <sockaddr_in *> &self.endpoint
        self.sender = sender
        self.receiver = receiver
        self.size = size
        endpoint.sin_family = AF_INET
        endpoint.sin_port = <uint16_t> ((port & 0xFF) << 8 | port >> 8)
        memcpy(&endpoint.sin_addr, <const uint8_t *> address, 4)
        self.inbox = <ReceiveBatch *> calloc(1, sizeof(ReceiveBatch))
        self.outbox = <SendBatch *> calloc(1, sizeof(SendBatch))
        self.payload = <uint8_t *> calloc(TRANSFER_RUN, size)
        if self.inbox == NULL or self.outbox == NULL or self.payload == NULL:
            raise MemoryError
        self.inbox.buffers = <uint8_t *> malloc(<size_t> BATCH * RECEIVE_STRIDE)
        if self.inbox.buffers == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.inbox != NULL:
            free(self.inbox.buffers)
        free(self.inbox)
        free(self.outbox)
        free(self.payload)

    def run(self, bint gso, bint mmsg):
        """Send them, then receive them; how many bytes arrived."""
        cdef int run = TRANSFER_RUN if gso else 1
        cdef int messages = TRANSFER // run
        cdef int at_once = min(messages, BATCH) if mmsg else 1
        cdef int i, n, _i
        cdef int64_t total = 0
        with nogil:
            for i in range(at_once):
                self.pieces[i].iov_base = self.payload
                self.pieces[i].iov_len = run * self.size
                send_describe(
                    self.outbox,
                    i,
                    &self.endpoint,
                    sizeof(sockaddr_in),
                    &self.pieces[i],
                    1,
                    self.size if gso else 0,
                    0,
                )
            for _i in range(messages // at_once):
                if send_batch(self.sender, self.outbox, 0, at_once) != at_once:
                    break
            while True:
                n = receive_batch(self.receiver, self.inbox, BATCH if mmsg else 1)
                if n <= 0:
                    break
                for i in range(n):
                    total += received(self.inbox, i).length
        return total
