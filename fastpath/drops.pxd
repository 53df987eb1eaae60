from libc.stdint cimport uint64_t


cdef enum Drop:
    DROP_NONE = 0
    DROP_OUTER_OVERSIZE
    DROP_UNKNOWN_PEER
    DROP_TUNNEL_SHORT
    DROP_TUNNEL_VERSION
    DROP_TUNNEL_FLAGS
    DROP_TUNNEL_OAM
    DROP_TUNNEL_PROTOCOL
    DROP_TUNNEL_OPTIONS
    DROP_TUNNEL_CRITICAL_OPTION
    DROP_VNI_UNKNOWN
    DROP_VIRTIO_HEADER
    DROP_FRAME_SHORT
    DROP_FRAME_NOT_FOR_ROUTER
    DROP_FRAME_VLAN
    DROP_FRAME_NOT_IP
    DROP_IP_MALFORMED
    DROP_IP_TTL_EXPIRED
    DROP_INNER_SOURCE
    DROP_INNER_DESTINATION
    DROP_NO_ROUTE
    DROP_TOO_BIG
    DROP_ECN_CE_NOT_ECT
    DROP_INNER_CHECKSUM
    DROP_PROBES_FULL
    DROP_UDP_FULL
    DROP_UDP_ERROR
    DROP_TAP_FULL
    DROP_TAP_ERROR
    DROP_REASONS  # how many values there are, DROP_NONE among them


# What one direction has done. Every frame or datagram that is received is either forwarded or
# dropped, once, under one reason: received == forwarded + sum(drops). Probes (wire/probe.pxd) that were
# sent (encap) or heard (decap) are counted beside, and are no part of that.
cdef struct Counters:
    uint64_t received
    uint64_t forwarded
    uint64_t forwarded_bytes
    uint64_t probes
    uint64_t drops[DROP_REASONS]


cdef inline void count_drop(Counters *counters, int reason, uint64_t packets) noexcept nogil:
    counters.drops[reason] += packets


cdef dict drops_by_name(const Counters *counters)
