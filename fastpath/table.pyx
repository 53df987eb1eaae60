"""The inner-address table, the peers it leads to, and the outer addresses they may send from."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastpath.linux cimport (
    AF_INET,
    AF_INET6,
    sockaddr_in,
    sockaddr_in6,
)
from fastpath.wire.byteorder cimport load32, load64, store16
from fastpath.wire.classify cimport mix64
from fastpath.wire.geneve cimport GENEVE_PARTIAL_HEADER, geneve_encode, geneve_encode_partial
from fastpath.wire.vxlan cimport vxlan_encode

LOCAL_SLOT = LOCAL
MAX_PEERS = PEER_LIMIT


cdef inline Address address4(const uint8_t *address) noexcept nogil:
    return Address(<uint64_t> load32(address) << 32, 0)


cdef inline Address address6(const uint8_t *address) noexcept nogil:
    return Address(load64(address), load64(address + 8))


cdef inline Address masked(Address address, Address mask) noexcept nogil:
    return Address(address.high & mask.high, address.low & mask.low)


cdef inline Address mask_of(int length) noexcept nogil:
    cdef uint64_t ones = ~(<uint64_t> 0)
    if length == 0:
        return Address(0, 0)
    if length <= 64:
        return Address(ones << (64 - length), 0)
    return Address(ones, ones << (128 - length))


cdef inline Entry *probe(const Level *level, Address prefix) noexcept nogil:
    """The prefix's entry, or the free one where it would go."""
    cdef uint32_t at = <uint32_t> mix64(prefix.high ^ mix64(prefix.low))
    cdef Entry *entry
    while True:
        entry = &level.entries[at & (level.capacity - 1)]
        if entry.slot == NO_SLOT or (
            entry.prefix.high == prefix.high and entry.prefix.low == prefix.low
        ):
            return entry
        at += 1


cdef inline int32_t find(const Family *family, Address address) noexcept nogil:
    cdef const Level *level
    cdef const Entry *entry
    cdef int i
    for i in range(family.count):
        level = &family.levels[i]
        entry = probe(level, masked(address, level.mask))
        if entry.slot != NO_SLOT:
            return entry.slot
    return NO_SLOT


cdef int level_resize(Level *level, uint32_t capacity) except -1:
    """Give the level a table of `capacity` places and move its entries there."""
    cdef Entry *old = level.entries
    cdef uint32_t old_capacity = level.capacity
    cdef Entry *entries = <Entry *> calloc(capacity, sizeof(Entry))
    cdef uint32_t i
    if entries == NULL:
        raise MemoryError
    for i in range(capacity):
        entries[i].slot = NO_SLOT
    level.entries = entries
    level.capacity = capacity
    for i in range(old_capacity):
        if old[i].slot != NO_SLOT:
            probe(level, old[i].prefix)[0] = old[i]
    free(old)
    return 0


cdef void level_remove(Level *level, Entry *hole) noexcept:
    """Free an entry, and put those that were displaced behind it back within reach."""
    cdef uint32_t at = <uint32_t> (hole - level.entries)
    cdef Entry moved
    hole.slot = NO_SLOT
    level.count -= 1
    while True:
        at = (at + 1) & (level.capacity - 1)
        if level.entries[at].slot == NO_SLOT:
            return
        moved = level.entries[at]
        level.entries[at].slot = NO_SLOT
        probe(level, moved.prefix)[0] = moved


cdef Level *family_level(Family *family, int length) noexcept:
    cdef int i
    for i in range(family.count):
        if family.levels[i].length == length:
            return &family.levels[i]
    return NULL


cdef Level *family_add_level(Family *family, int length) except NULL:
    cdef Level level
    cdef int at = family.count
    memset(&level, 0, sizeof(level))
    level.length = length
    level.mask = mask_of(length)
    level_resize(&level, 8)
    while at and family.levels[at - 1].length < length:
        family.levels[at] = family.levels[at - 1]
        at -= 1
    family.levels[at] = level
    family.count += 1
    return &family.levels[at]


cdef void family_drop_level(Family *family, Level *level) noexcept:
    cdef int at = <int> (level - family.levels)
    free(level.entries)
    family.count -= 1
    while at < family.count:
        family.levels[at] = family.levels[at + 1]
        at += 1


cdef int family_insert(Family *family, Address prefix, int length, int32_t slot) except -1:
    cdef Level *level = family_level(family, length)
    cdef Entry *entry
    if level == NULL:
        level = family_add_level(family, length)
    if (level.count + 1) * 2 > level.capacity:
        level_resize(level, level.capacity * 2)
    entry = probe(level, prefix)
    level.count += entry.slot == NO_SLOT
    entry.prefix = prefix
    entry.slot = slot
    return 0


cdef class PrefixTable:
    """Longest-prefix match from an inner address (4 or 16 bytes) to a slot."""

    def __dealloc__(self):
        cdef int i
        for i in range(self.v4.count):
            free(self.v4.levels[i].entries)
        for i in range(self.v6.count):
            free(self.v6.levels[i].entries)

    cdef int32_t find4(self, const uint8_t *address) noexcept nogil:
        return find(&self.v4, address4(address))

    cdef int32_t find6(self, const uint8_t *address) noexcept nogil:
        return find(&self.v6, address6(address))

    def insert(self, bytes address not None, int length, int slot):
        """Add or repoint a prefix. ValueError on a bad length or on host bits that are set."""
        cdef Address prefix = checked_prefix(address, length)
        if not 0 <= slot < PEER_LIMIT:
            raise ValueError(f"slot: {slot} is not in 0..{PEER_LIMIT - 1}")
        family_insert(&self.v4 if len(address) == 4 else &self.v6, prefix, length, slot)

    def remove(self, bytes address not None, int length):
        """KeyError if the prefix is not in the table."""
        cdef Address prefix = checked_prefix(address, length)
        cdef Family *family = &self.v4 if len(address) == 4 else &self.v6
        cdef Level *level = family_level(family, length)
        cdef Entry *entry = NULL if level == NULL else probe(level, prefix)
        if entry == NULL or entry.slot == NO_SLOT:
            raise KeyError((address, length))
        level_remove(level, entry)
        if level.count == 0:
            family_drop_level(family, level)

    def lookup(self, bytes address not None):
        """The slot of the longest prefix that holds the address, or None."""
        cdef int32_t slot
        if len(address) == 4:
            slot = self.find4(address)
        elif len(address) == 16:
            slot = self.find6(address)
        else:
            raise ValueError(f"address: {len(address)} bytes, 4 or 16 allowed")
        return None if slot == NO_SLOT else slot

    def __len__(self):
        cdef int i
        cdef Py_ssize_t total = 0
        for i in range(self.v4.count):
            total += self.v4.levels[i].count
        for i in range(self.v6.count):
            total += self.v6.levels[i].count
        return total


cdef Address checked_prefix(bytes address, int length) except *:
    cdef Address prefix, inside
    if len(address) == 4:
        prefix = address4(address)
    elif len(address) == 16:
        prefix = address6(address)
    else:
        raise ValueError(f"address: {len(address)} bytes, 4 or 16 allowed")
    if not 0 <= length <= len(address) * 8:
        raise ValueError(f"length: {length} is not in 0..{len(address) * 8}")
    inside = masked(prefix, mask_of(length))
    if inside.high != prefix.high or inside.low != prefix.low:
        raise ValueError(f"address: {address.hex()} has bits set beyond its length {length}")
    return prefix


cdef class PeerTable:
    """Slot -> how to reach a peer, and outer address -> slot for what it may send from."""

    def __cinit__(self):
        self.sources = PrefixTable()
        self.capacity = 0
        self.slots = NULL

    def __dealloc__(self):
        free(self.slots)

    def set(
        self,
        int slot,
        *,
        str encapsulation not None,
        vni,
        bytes router_mac not None,
        bytes endpoint not None,
        port,
        mtu,
        bint partial_checksums=False,
        bint from_home=False,
    ):
        """Fill or replace a slot. Counters of a slot that was in use are kept."""
        cdef Peer *peer
        if not 0 < slot < PEER_LIMIT:
            raise ValueError(f"slot: {slot} is not in 1..{PEER_LIMIT - 1}")
        if encapsulation not in ("geneve", "vxlan"):
            raise ValueError(f"encapsulation: {encapsulation!r} is neither 'geneve' nor 'vxlan'")
        if not 0 <= vni < 1 << 24:
            raise ValueError(f"vni: {vni} is not in 0..{(1 << 24) - 1}")
        if len(router_mac) != 6:
            raise ValueError(f"router_mac: {len(router_mac)} bytes, 6 needed")
        if len(endpoint) not in (4, 16):
            raise ValueError(f"endpoint: {len(endpoint)} bytes, 4 or 16 allowed")
        if not 0 < port < 65536:
            raise ValueError(f"port: {port} is not in 1..65535")
        if not 0 < mtu < 65536:
            raise ValueError(f"mtu: {mtu} is not in 1..65535")
        if partial_checksums and encapsulation != "geneve":
            raise ValueError("partial_checksums: only Geneve has an option that says so")
        reserve(self, slot)
        peer = &self.slots[slot]
        peer.used = True
        peer.mtu = mtu
        if encapsulation == "geneve":
            peer.encapsulation = GENEVE
            geneve_encode(peer.header, vni)
        else:
            peer.encapsulation = VXLAN
            vxlan_encode(peer.header, vni)
        memcpy(peer.header + 8, <const uint8_t *> router_mac, 6)
        peer.partial_checksums = partial_checksums
        peer.from_home = from_home
        geneve_encode_partial(peer.partial_header, vni)
        memcpy(peer.partial_header + GENEVE_PARTIAL_HEADER, <const uint8_t *> router_mac, 6)
        peer_endpoint(peer, endpoint, len(endpoint), port)

    def clear(self, int slot):
        """Forget the slot, its counters and every source address that leads to it."""
        cdef Peer *peer = used(self, slot)
        sources_forget(&self.sources.v4, slot)
        sources_forget(&self.sources.v6, slot)
        memset(peer, 0, sizeof(Peer))

    def allow_source(self, bytes address not None, int slot):
        """Datagrams from this outer address are this peer's. ValueError if it is another's."""
        used(self, slot)
        owner = self.sources.lookup(address)
        if owner is not None and owner != slot:
            raise ValueError(f"address: {address.hex()} is the endpoint of slot {owner}")
        self.sources.insert(address, len(address) * 8, slot)

    def forget_source(self, bytes address not None):
        """KeyError if no peer may send from the address."""
        self.sources.remove(address, len(address) * 8)

    def find_source(self, bytes address not None):
        return self.sources.lookup(address)

    def counters(self, int slot):
        """Inner IP packets and their bytes, each way. KeyError if the slot is free."""
        cdef Peer *peer = used(self, slot)
        return {
            "encap_packets": peer.encap_packets,
            "encap_bytes": peer.encap_bytes,
            "decap_packets": peer.decap_packets,
            "decap_bytes": peer.decap_bytes,
        }


cdef Peer *used(PeerTable table, int slot) except NULL:
    if not 0 < slot < <int> table.capacity or not table.slots[slot].used:
        raise KeyError(f"slot {slot} holds no peer")
    return &table.slots[slot]


cdef int reserve(PeerTable table, int slot) except -1:
    """Grow the slots until `slot` is among them."""
    cdef uint32_t capacity = max(table.capacity, 16)
    cdef Peer *slots
    while capacity <= <uint32_t> slot:
        capacity *= 2
    if capacity == table.capacity:
        return 0
    slots = <Peer *> calloc(capacity, sizeof(Peer))
    if slots == NULL:
        raise MemoryError
    if table.slots != NULL:
        memcpy(slots, table.slots, table.capacity * sizeof(Peer))
        free(table.slots)
    table.slots = slots
    table.capacity = capacity
    return 0


cdef void peer_endpoint(Peer *peer, const uint8_t *address, size_t length, uint16_t port) noexcept:
    cdef sockaddr_in *v4 = <sockaddr_in *> &peer.endpoint
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *> &peer.endpoint
    memset(&peer.endpoint, 0, sizeof(peer.endpoint))
    if length == 4:
        peer.family = AF_INET
        peer.endpoint_length = sizeof(sockaddr_in)
        v4.sin_family = AF_INET
        store16(&v4.sin_port, port)
        memcpy(&v4.sin_addr, address, 4)
    else:
        peer.family = AF_INET6
        peer.endpoint_length = sizeof(sockaddr_in6)
        v6.sin6_family = AF_INET6
        store16(&v6.sin6_port, port)
        memcpy(&v6.sin6_addr, address, 16)


cdef void sources_forget(Family *family, int32_t slot) noexcept:
    """Remove every entry that leads to `slot`; a removal moves others, so the walk starts again."""
    cdef Level *level
    cdef uint32_t i
    if family.count == 0:
        return
    level = family.levels
    i = 0
    while i < level.capacity:
        if level.entries[i].slot == slot:
            level_remove(level, &level.entries[i])
            i = 0
        else:
            i += 1
    if level.count == 0:
        family_drop_level(family, level)
