from typing import Final

LOCAL_SLOT: Final[int]
"""The slot that means "this node": prefixes that point at it are our own."""

MAX_PEERS: Final[int]

class PrefixTable:
    """Longest-prefix match from an inner address (4 or 16 bytes) to a slot."""

    def insert(self, address: bytes, length: int, slot: int) -> None:
        """Add or repoint a prefix. ValueError on a bad length or on host bits that are set."""
    def remove(self, address: bytes, length: int) -> None:
        """KeyError if the prefix is not in the table."""
    def lookup(self, address: bytes) -> int | None: ...
    def __len__(self) -> int: ...

class PeerTable:
    """Slot -> how to reach a peer, and outer address -> slot for what it may send from."""

    def set(
        self,
        slot: int,
        *,
        encapsulation: str,
        vni: int,
        router_mac: bytes,
        endpoint: bytes,
        port: int,
        mtu: int,
        partial_checksums: bool = False,
        from_home: bool = False,
    ) -> None:
        """Fill or replace a slot (1..MAX_PEERS-1). `encapsulation` is "geneve" or "vxlan";
        `endpoint` is 4 or 16 bytes, network order; `mtu` is the largest inner IP packet, bytes.
        `partial_checksums` lets inner TCP and UDP checksums be left unfinished both ways, under a
        Geneve option (wire/geneve.pxd). `from_home` sends all its datagrams from the port that we receive
        on, the one that a NAT between us lets in. Counters of a slot that was in use are kept."""
    def clear(self, slot: int) -> None:
        """Forget the slot, its counters and every source address that leads to it."""
    def allow_source(self, address: bytes, slot: int) -> None:
        """Datagrams from this outer address are this peer's. ValueError if it is another's."""
    def forget_source(self, address: bytes) -> None: ...
    def find_source(self, address: bytes) -> int | None: ...
    def counters(self, slot: int) -> dict[str, int]:
        """encap_packets, encap_bytes, decap_packets, decap_bytes: inner IP packets and their bytes."""
