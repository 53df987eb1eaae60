"""Why packets are dropped: one enum, and its names."""

import enum


class DropReason(enum.IntEnum):
    """Why a frame or datagram was not forwarded. One name per cause, counted per direction."""

    OUTER_OVERSIZE = DROP_OUTER_OVERSIZE
    UNKNOWN_PEER = DROP_UNKNOWN_PEER
    TUNNEL_SHORT = DROP_TUNNEL_SHORT
    TUNNEL_VERSION = DROP_TUNNEL_VERSION
    TUNNEL_FLAGS = DROP_TUNNEL_FLAGS
    TUNNEL_OAM = DROP_TUNNEL_OAM
    TUNNEL_PROTOCOL = DROP_TUNNEL_PROTOCOL
    TUNNEL_OPTIONS = DROP_TUNNEL_OPTIONS
    TUNNEL_CRITICAL_OPTION = DROP_TUNNEL_CRITICAL_OPTION
    VNI_UNKNOWN = DROP_VNI_UNKNOWN
    VIRTIO_HEADER = DROP_VIRTIO_HEADER
    FRAME_SHORT = DROP_FRAME_SHORT
    FRAME_NOT_FOR_ROUTER = DROP_FRAME_NOT_FOR_ROUTER
    FRAME_VLAN = DROP_FRAME_VLAN
    FRAME_NOT_IP = DROP_FRAME_NOT_IP
    IP_MALFORMED = DROP_IP_MALFORMED
    IP_TTL_EXPIRED = DROP_IP_TTL_EXPIRED
    INNER_SOURCE = DROP_INNER_SOURCE
    INNER_DESTINATION = DROP_INNER_DESTINATION
    NO_ROUTE = DROP_NO_ROUTE
    TOO_BIG = DROP_TOO_BIG
    ECN_CE_NOT_ECT = DROP_ECN_CE_NOT_ECT
    INNER_CHECKSUM = DROP_INNER_CHECKSUM
    PROBES_FULL = DROP_PROBES_FULL
    UDP_FULL = DROP_UDP_FULL
    UDP_ERROR = DROP_UDP_ERROR
    TAP_FULL = DROP_TAP_FULL
    TAP_ERROR = DROP_TAP_ERROR


if len(DropReason) != DROP_REASONS - 1:
    raise ImportError("fastpath.drops: the enum in drops.pxd and DropReason differ")

cdef list NAMES = [(int(reason), reason.name.lower()) for reason in DropReason]


cdef dict drops_by_name(const Counters *counters):
    return {name: counters.drops[<int> value] for value, name in NAMES}
