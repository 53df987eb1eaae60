# Geneve, RFC 8926. This endpoint knows one option, and only from peers it has agreed on it with: it
# forwards a packet only if every other option may be ignored. No UDP, no sockets.
#
# The option, of the experimental class range (section 7) and critical, is only its header. It says
# that the inner packet's TCP or UDP checksum is partial, the sum of the pseudo-header: the outer
# checksum covers the payload, and the receiver's host finishes the inner one if anybody asks for it.

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from fastpath.drops cimport (
    DROP_TUNNEL_CRITICAL_OPTION,
    DROP_TUNNEL_OAM,
    DROP_TUNNEL_OPTIONS,
    DROP_TUNNEL_PROTOCOL,
    DROP_TUNNEL_SHORT,
    DROP_TUNNEL_VERSION,
)
from fastpath.wire.byteorder cimport load16, load32, store16, store32
from fastpath.wire.ethernet cimport ETHERTYPE_BRIDGED


cdef enum:
    GENEVE_HEADER = 8
    GENEVE_OPTION_HEADER = 4
    GENEVE_OAM = 0x80
    GENEVE_OPTION_CRITICAL = 0x80
    GENEVE_CRITICAL = 0x40        # in the header's second byte: some option is critical
    GENEVE_PARTIAL_CLASS = 0xFF71
    GENEVE_PARTIAL_TYPE = 0x81
    GENEVE_PARTIAL_HEADER = GENEVE_HEADER + GENEVE_OPTION_HEADER


cdef inline void geneve_encode(uint8_t *header, uint32_t vni) noexcept nogil:
    """The 8 bytes of a header with no options, around an Ethernet frame."""
    memset(header, 0, GENEVE_HEADER)
    store16(header + 2, ETHERTYPE_BRIDGED)
    store32(header + 4, vni << 8)


cdef inline void geneve_encode_partial(uint8_t *header, uint32_t vni) noexcept nogil:
    """The GENEVE_PARTIAL_HEADER bytes of a header with the partial-checksum option."""
    geneve_encode(header, vni)
    header[0] = GENEVE_OPTION_HEADER // 4
    header[1] = GENEVE_CRITICAL
    store16(header + GENEVE_HEADER, GENEVE_PARTIAL_CLASS)
    header[GENEVE_HEADER + 2] = GENEVE_PARTIAL_TYPE
    header[GENEVE_HEADER + 3] = 0


cdef inline bint is_partial_option(const uint8_t *option) noexcept nogil:
    return (
        load16(option) == GENEVE_PARTIAL_CLASS
        and option[2] == GENEVE_PARTIAL_TYPE
        and option[3] & 0x1F == 0
    )


cdef inline int geneve_options(const uint8_t *options, int length, bint *partial) noexcept nogil:
    """0 if the options fill their length exactly and all but the known may be ignored, else -Drop.
    `partial` says whether its option may come, and then whether it did."""
    cdef int at = 0
    cdef bint critical = False
    cdef bint found = False
    while at < length:
        if length - at < GENEVE_OPTION_HEADER:
            return -DROP_TUNNEL_OPTIONS
        if partial[0] and is_partial_option(options + at):
            found = True
        else:
            critical = critical or options[at + 2] & GENEVE_OPTION_CRITICAL != 0
        at += GENEVE_OPTION_HEADER + (options[at + 3] & 0x1F) * 4
    if at != length:
        return -DROP_TUNNEL_OPTIONS  # section 3.5: lengths that do not add up, silently dropped
    partial[0] = found
    # Section 3.5.1: an unknown option with the critical bit, whatever the header's C bit says.
    return -DROP_TUNNEL_CRITICAL_OPTION if critical else 0


cdef inline int geneve_decode(
    const uint8_t *datagram, size_t length, uint32_t *vni, bint *partial
) noexcept nogil:
    """Bytes of the header with its options, or -Drop. `partial` as of geneve_options."""
    cdef int options, verdict
    if length < GENEVE_HEADER:
        return -DROP_TUNNEL_SHORT
    if datagram[0] >> 6 != 0:
        return -DROP_TUNNEL_VERSION
    options = (datagram[0] & 0x3F) * 4
    if <size_t> (GENEVE_HEADER + options) > length:
        return -DROP_TUNNEL_OPTIONS
    if options == 0:
        partial[0] = False
    else:
        verdict = geneve_options(datagram + GENEVE_HEADER, options, partial)
        if verdict < 0:
            return verdict
    if datagram[1] & GENEVE_OAM:
        return -DROP_TUNNEL_OAM  # section 3.4: a control packet is never forwarded
    if load16(datagram + 2) != ETHERTYPE_BRIDGED:
        return -DROP_TUNNEL_PROTOCOL
    vni[0] = load32(datagram + 4) >> 8
    return GENEVE_HEADER + options


cdef inline int geneve_control(const uint8_t *datagram, uint32_t *vni) noexcept nogil:
    """Of a datagram that geneve_decode dropped as a control packet: as if it were none."""
    if load16(datagram + 2) != ETHERTYPE_BRIDGED:
        return -DROP_TUNNEL_OAM
    vni[0] = load32(datagram + 4) >> 8
    return GENEVE_HEADER + (datagram[0] & 0x3F) * 4
