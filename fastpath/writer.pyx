"""Writing packets to the TAP, merged where that loses nothing."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fastpath.drops cimport (
    DROP_INNER_CHECKSUM,
    DROP_TAP_ERROR,
    DROP_TAP_FULL,
    DROP_TOO_BIG,
    count_drop,
)
from fastpath.kernel.tap cimport tap_write
from fastpath.linux cimport EAGAIN, EINVAL, ENOBUFS
from fastpath.offload.coalesce cimport (
    BUCKETS,
    NO_CHAIN,
    chain_finish,
    chain_offload,
    chain_packet,
    chain_restore,
    checksum_is_partial,
    coalesce_add,
    coalesce_reset,
    coalesce_superframe,
    packet_offload,
    superframe_checksum,
    superframe_headers,
)
from fastpath.offload.virtio cimport virtio_encode
from fastpath.table cimport Peer
from fastpath.wire.byteorder cimport store16
from fastpath.wire.ethernet cimport ETHERNET_HEADER, ETHERNET_TYPE, ETHERTYPE_IPV4, ETHERTYPE_IPV6
from fastpath.wire.ip cimport PROTOCOL_UDP


cdef class Writer:
    """The TAP of one node, and the chains before it."""

    def __cinit__(self, int fd, int vnet_size, bytes router_mac, bytes gateway_mac, PeerTable peers not None):
        cdef int i
        self.fd = fd
        self.vnet_size = vnet_size
        self.peers = peers
        memcpy(self.header + vnet_size, <const uint8_t *> gateway_mac, 6)
        memcpy(self.header + vnet_size + 6, <const uint8_t *> router_mac, 6)
        self.chains = <Coalescer *> calloc(1, sizeof(Coalescer))
        if self.chains == NULL:
            raise MemoryError
        for i in range(BUCKETS):
            self.chains.newest[i] = NO_CHAIN

    def __dealloc__(self):
        free(self.chains)

    cdef void put(self, const Frame *info, uint16_t slot, bint said_partial) noexcept nogil:
        """Take a packet. borrowed: until flush()."""
        if not coalesce_add(self.chains, info, slot, said_partial):
            self.flush()
            coalesce_add(self.chains, info, slot, said_partial)

    cdef int put_superframe(self, const Frame *info, uint16_t slot, uint32_t mtu) noexcept nogil:
        """Take a packet longer than `mtu`, to be cut to it again; 0 or the Drop."""
        cdef uint32_t headers = superframe_headers(info)
        if headers == 0 or headers >= mtu:
            return DROP_TOO_BIG
        if not superframe_checksum(info):
            return DROP_INNER_CHECKSUM
        if not coalesce_superframe(self.chains, info, slot, headers, mtu - headers):
            self.flush()
            coalesce_superframe(self.chains, info, slot, headers, mtu - headers)
        return 0

    cdef void flush(self) noexcept nogil:
        cdef int i
        for i in range(self.chains.count):
            self._write_chain(&self.chains.chains[i])
        coalesce_reset(self.chains)

    cdef void _write_chain(self, Chain *chain) noexcept nogil:
        cdef VnetHeader offload
        cdef ssize_t written
        cdef uint64_t packet_bytes
        if chain.packets == 1:
            if chain.superframe:
                offload = chain_offload(chain, chain.headers, chain.superframe)
            else:
                offload = packet_offload(&chain.first, chain.partial)
            written = self._write(chain, 1, &offload)
            self._count(chain, 1, chain.pieces[1].iov_len, written)
            return
        offload = chain_finish(chain)
        written = self._write(chain, chain.packets, &offload)
        if written == -EINVAL:
            # If its packets are taken one by one, this kernel takes no such superframe: later ones
            # are not merged.
            chain_restore(chain)
            if self._write_singly(chain):
                if chain.first.protocol == PROTOCOL_UDP:
                    self.chains.udp = False
                else:
                    self.chains.tcp = False
            return
        packet_bytes = <uint64_t> chain.packets * chain.headers + chain.payload
        self._count(chain, chain.packets, packet_bytes, written)

    cdef bint _write_singly(self, Chain *chain) noexcept nogil:
        """Write each packet of a restored chain whole; whether any was taken."""
        cdef VnetHeader offload
        cdef Frame info
        cdef ssize_t written
        cdef bint any_taken = False
        cdef int k
        for k in range(1, chain.packets + 1):
            info = chain_packet(chain, k)
            offload = packet_offload(&info, checksum_is_partial(&info))
            chain.pieces[1].iov_base = info.packet
            chain.pieces[1].iov_len = info.packet_length
            written = self._write(chain, 1, &offload)
            any_taken = any_taken or written >= 0
            self._count(chain, 1, info.packet_length, written)
        return any_taken

    cdef ssize_t _write(self, Chain *chain, int pieces, const VnetHeader *offload) noexcept nogil:
        """Write the chain's first pieces behind one virtio and Ethernet header; bytes or -errno."""
        virtio_encode(self.header, offload)
        store16(
            self.header + self.vnet_size + ETHERNET_TYPE,
            ETHERTYPE_IPV4 if chain.first.family == 4 else ETHERTYPE_IPV6,
        )
        chain.pieces[0].iov_base = self.header
        chain.pieces[0].iov_len = self.vnet_size + ETHERNET_HEADER
        return tap_write(self.fd, chain.pieces, 1 + pieces)

    cdef void _count(
        self, const Chain *chain, int packets, uint64_t packet_bytes, ssize_t written
    ) noexcept nogil:
        cdef Peer *peer = &self.peers.slots[chain.slot]
        if written < 0:
            count_drop(
                self.counters,
                DROP_TAP_FULL if written == -EAGAIN or written == -ENOBUFS else DROP_TAP_ERROR,
                packets,
            )
            return
        peer.decap_packets += packets
        peer.decap_bytes += packet_bytes
        self.counters.forwarded += packets
        self.counters.forwarded_bytes += packet_bytes
