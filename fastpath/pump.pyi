from fastpath.table import PeerTable, PrefixTable

class Pump:
    """The two journeys: encap (TAP to UDP) and decap (UDP to TAP). Owns no descriptor: it borrows
    them, the caller closes them. Not thread-safe: one loop calls every method."""

    def __init__(
        self,
        *,
        tap_fd: int,
        vnet_header_size: int,
        router_mac: bytes,
        gateway_mac: bytes,
        vni: int,
        prefixes: PrefixTable,
        peers: PeerTable,
        vxlan_reserved_bits: str = "strict",
        mtu: int = 65535,
    ) -> None:
        """`router_mac` is the virtual router's: what frames to the wire are addressed to and what
        peers address us by. `gateway_mac` is the bridge's own, which decapsulated frames go to.
        `mtu` is the pods': a longer inner packet is a superframe that a peer's kernel did not cut, and
        goes on as one if it is TCP, else it is TOO_BIG."""
    def add_receiver(self, fd: int, encapsulation: str) -> None:
        """A bound, non-blocking UDP socket whose datagrams are "geneve" or "vxlan"."""
    def add_sender(self, fd: int, family: int) -> None:
        """A non-blocking UDP socket for sending to AF_INET or AF_INET6 peers; the inner flow's
        hash picks one of those of its family (RFC 8926 section 3.3: source port entropy)."""
    def forget_sockets(self) -> None:
        """Receive and send by none any more, until some are added again. An uplink has to be set anew then:
        its datagrams look as if they came from the sockets."""
    def watch_tap(self) -> None:
        """Watch the TAP's descriptor again, after another TAP was put in its place (dup2)."""
    def set_mtu(self, mtu: int) -> None:
        """The pods' MTU is another now."""
    def fileno(self) -> int:
        """Readable when turn() has something to do. The pump's own: it closes with it."""
    def turn(self, idle_microseconds: int = 0) -> None:
        """Move what is there, both ways in turns, and wait up to `idle_microseconds` each time for more;
        returns when nothing came, or after a bounded number of rounds. OSError if a descriptor fails.
        `spin` adds a moment (see fastpath/spin.pxd) to the wait."""
    def encap(self, budget: int = ...) -> int:
        """Read up to `budget` frames from the TAP and send them; how many were read."""
    def decap(self, fd: int, budget: int = ...) -> int:
        """Receive up to `budget` datagrams from one receiver and deliver them; how many were received."""
    def set_uplink(self, fd: int, mac: bytes) -> None:
        """A TAP, not of the bridge, that takes superframes inside their tunnel (UDP tunnel GSO, Linux
        6.17) behind a header of kernel.tap.TUNNEL_VNET_HEADER_SIZE bytes, and its MAC. Borrowed; TCP
        superframes go there from now on, and the host routes them out."""
    @property
    def offloads(self) -> dict[str, bool]:
        """{name: on} of what the pump can do without: udp_segment, merge_tcp, merge_udp, uplink, spin. One
        that was on and is off was refused by the kernel."""
    def set_offload(self, name: str, on: bool) -> None:
        """ValueError if there is no such offload."""
    def send_probe(self, slot: int, flow: int, probe: bytes, packet_bytes: int = ...) -> bool:
        """Send 64 bytes of probe to a peer as a packet of that flow would go, padded with zeroes to
        `packet_bytes` behind its inner Ethernet header; whether the kernel took it. KeyError if the slot
        is free."""
    def take_probes(self) -> list[tuple[int, bytes]]:
        """[(slot, probe without padding)] of what was heard since the last call, in order. At most 512 wait;
        more are dropped as PROBES_FULL."""
    def hear_roaming(self, on: bool) -> None:
        """Whether probes of the kinds from 0x10 on are heard, which may come from any address. Off at first:
        then a stranger's are an unknown peer's, and a peer's PROBES_FULL."""
    def take_roaming_probes(self) -> list[tuple[int, str, bytes, int, bytes]]:
        """[(slot, encapsulation, outer address, outer port, probe without padding)] of what was heard since
        the last call, in order; slot -1 is nobody's address. At most 64 wait."""
    def counters(self) -> dict[str, dict[str, int]]:
        """{"encap": {...}, "decap": {...}}: frames/datagrams seen, packets delivered, bytes, drops by name.

        Each direction has "received", "forwarded", "forwarded_bytes", and "drops": {reason: n}; and beside
        them "probes", sent or heard."""
    @property
    def moved_bytes(self) -> int:
        """Bytes of the packets that were forwarded, either way."""
    def drops(self) -> dict[str, dict[str, int]]:
        """{"encap": {reason: n}, "decap": {reason: n}}, every reason present, names in lower case."""
