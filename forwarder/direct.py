"""The edge of `legs`: which peers are on our segments, the BFD packets to and from them, and the news.

A socket is bound to our gateway's address and to a link. So what it sends goes by the link's own route,
wherever traffic goes, and what it receives came by the link: both as pods' packets do without a tunnel.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Final

from forwarder import bfd
from forwarder.addresses import Address, Network, gateway_of
from forwarder.kernel_routes import RouteAsker, RouteKeeper, RouteWatch
from forwarder.legs import Leg, Legs, NextHop, Way, covered
from forwarder.paths import some
from forwarder.peers import DIRECT, PeerRecord

log = logging.getLogger("podloom")

LOOK_SECONDS: Final = 1.0
"""Between two looks at who is on our segments."""

BURST_SECONDS: Final = 0.2
"""What changes comes in bursts: one look for all of it."""

LOOK_PEERS: Final = 64
"""In one go on the event loop, at some 60 microseconds each."""

TICK_SECONDS: Final = 0.05
RECEIVE_BATCH: Final = 512
RECEIVE_BUFFER_BYTES: Final = 1 << 22
"""Some 1,800 packets: what all peers send in a second."""

HOP_LIMIT: Final = 255
"""Of packets that no router has touched (RFC 5082)."""

HEADER_BYTES: Final = {4: 20 + 8, 6: 40 + 8}
FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}

# linux/in.h, asm-generic/socket.h; the socket module lacks them.
IP_RECVTTL: Final = 12
SO_RCVBUFFORCE: Final = 33

_INT = struct.Struct("=i")


@dataclass(frozen=True, slots=True)
class Settings:
    """`prefixes` are this node's own; `mtu_bytes` is the pods'. `direct` says whether peers on our segments
    are reached directly; `routing_protocol` is the routing daemon's rtm_protocol, None if there is none."""

    endpoints: tuple[Address, ...]
    prefixes: tuple[Network, ...]
    cluster_cidrs: tuple[Network, ...]
    mtu_bytes: int
    port: int
    direct: bool
    routing_protocol: int | None


class Direct:
    """What keeps peers' prefixes out of the tunnel. `run` it beside the rest."""

    def __init__(
        self,
        settings: Settings,
        records: Mapping[str, PeerRecord],
        keeper: RouteKeeper,
        tunnel_is_down: Callable[[str], bool],
    ) -> None:
        """`records` is the daemon's own mapping, by node id; `tunnel_is_down` says of a node id whether it is
        known not to be reached by the tunnel."""
        gateways: dict[int, Address] = {
            prefix.version: gateway_of(prefix) for prefix in reversed(settings.prefixes)
        }
        self.drops = Counter[str]()
        """BFD packets that were refused, by reason."""
        self._settings = settings
        self._records = records
        self._keeper = keeper
        self._tunnel_is_down = tunnel_is_down
        self._legs = Legs(gateways, lambda: random.getrandbits(32) or 1)
        self._sockets = _Sockets(gateways, settings.port, self._read)
        self._watch = RouteWatch(
            settings.routing_protocol,
            changed=self.look_soon,
            disturbed=self._disturbed,
            ours_gone=keeper.note_gone,
        )
        self._links: Mapping[int, str] = {}
        self._look_now = asyncio.Event()
        self._unsettled = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run())
            tasks.create_task(self._settle())
            tasks.create_task(self._look())
            tasks.create_task(self._tick())

    def move(self, endpoints: tuple[Address, ...]) -> None:
        """The node is elsewhere on the underlay."""
        self._settings = replace(self._settings, endpoints=endpoints)
        self.look_soon()

    def resize(self, mtu_bytes: int) -> None:
        """The pods have another MTU."""
        self._settings = replace(self._settings, mtu_bytes=mtu_bytes)

    def look_soon(self) -> None:
        """The peers changed, or how they are reached."""
        self._look_now.set()

    def way(self, record: PeerRecord, prefix: Network) -> Way:
        """How the peer's prefix is reached now."""
        if prefix in self._keeper.by_bgp:
            return Way("bgp", "the routing daemon has a route")
        if not self._settings.direct:
            return Way("tunnel", 'underlay.direct is "off" here')
        return self._legs.way(record, prefix.version, time.monotonic())

    # Who is where

    async def _look(self) -> None:
        with RouteAsker() as asker, self._sockets:
            while True:
                self._look_now.clear()
                self._links = asker.links(self._settings.endpoints)
                by_bgp = self._covered()
                candidates = [record for record in self._records.values() if DIRECT in record.features]
                if not self._settings.direct:
                    candidates = []
                self._sockets.keep(self._links if candidates else {})
                self._legs.look(candidates, await self._reached(asker, candidates), by_bgp)
                if by_bgp != self._keeper.by_bgp:
                    self._tell_bgp(by_bgp)
                    self._keeper.by_bgp = by_bgp
                self._keeper.hops = self._legs.hops(self._records)
                self._unsettled.set()
                try:
                    await asyncio.wait_for(self._look_now.wait(), LOOK_SECONDS)
                    await asyncio.sleep(BURST_SECONDS)
                except TimeoutError:
                    continue

    def _covered(self) -> frozenset[Network]:
        destinations = self._watch.destinations
        if not destinations:
            return frozenset()
        prefixes = (prefix for record in self._records.values() for prefix in record.prefixes)
        return covered(prefixes, destinations, self._settings.cluster_cidrs)

    async def _reached(self, asker: RouteAsker, candidates: list[PeerRecord]) -> dict[Address, NextHop | str]:
        versions = {endpoint.version for endpoint in self._settings.endpoints}
        reached: dict[Address, NextHop | str] = {}
        for start in range(0, len(candidates), LOOK_PEERS):
            for record in candidates[start : start + LOOK_PEERS]:
                for endpoint in record.endpoints:
                    if endpoint.version in versions:
                        reached[endpoint] = self._with_socket(asker.reached(endpoint, self._links))
            await asyncio.sleep(0)
        return reached

    def _with_socket(self, found: NextHop | str) -> NextHop | str:
        if isinstance(found, NextHop) and (fault := self._sockets.faults.get(found.link)):
            return fault
        return found

    def _disturbed(self, link: int) -> None:
        if link == 0 or link in self._links:
            self._keeper.doubt()
            self._look_now.set()

    def _tell_bgp(self, by_bgp: frozenset[Network]) -> None:
        before = self._keeper.by_bgp
        for prefixes, what in ((by_bgp - before, "by BGP now"), (before - by_bgp, "not by BGP any more")):
            if prefixes:
                log.info("%s: %s", what, some(sorted(map(str, prefixes))))

    async def _settle(self) -> None:
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            await self._keeper.settle()

    # BFD

    async def _tick(self) -> None:
        while True:
            # What came while the loop was busy is heard before silence is judged.
            for sock, link in self._sockets:
                self._read(sock, link)
            now = time.monotonic()
            changed = []
            for leg in self._legs:
                if now >= leg.session.next_at:
                    packet = leg.session.tick(now, random.uniform(0.75, 1.0))  # noqa: S311 (section 6.8.7)
                    if packet is not None:
                        self._send(leg, packet)
                if self._update(leg, now):
                    changed.append(leg)
            self._follow(changed)
            await asyncio.sleep(TICK_SECONDS)

    def _update(self, leg: Leg, now: float) -> bool:
        return leg.update(now, lambda: self._tunnel_is_down(leg.node_id))

    def _send(self, leg: Leg, packet: bfd.Packet) -> None:
        version = leg.gateway.version
        data = bfd.encode(packet, self._settings.mtu_bytes - HEADER_BYTES[version])
        sock = self._sockets.get(version, leg.next_hop.link)
        if sock is None:
            return
        try:
            sock.sendto(data, (str(leg.gateway), self._settings.port))
        except OSError as error:
            self.drops[f"not sent: {error.strerror}"] += 1

    def _read(self, sock: socket.socket, link: str) -> None:
        changed = []
        for _ in range(RECEIVE_BATCH):
            try:
                data, ancillary, _, sender = sock.recvmsg(bfd.PACKET_BYTES, socket.CMSG_SPACE(_INT.size))
            except BlockingIOError:
                break
            except OSError:  # An ICMP error about what was sent.
                continue
            leg = self._accept(data, ancillary, sender[0], link)
            if leg is not None and self._update(leg, time.monotonic()):
                changed.append(leg)
        self._follow(changed)

    def _accept(self, data: bytes, ancillary: list[Any], sender: str, link: str) -> Leg | None:
        leg = self._legs.find(ip_address(sender))
        if leg is None or leg.next_hop.link != link:
            self.drops["sender"] += 1
            return None
        if any(_INT.unpack(value[: _INT.size])[0] != HOP_LIMIT for _, _, value in ancillary):
            self.drops["hop_limit"] += 1
            return None
        try:
            answer = leg.session.receive(bfd.decode(data), time.monotonic())
        except bfd.RefusedError as error:
            self.drops[str(error)] += 1
            return None
        if answer is not None:
            self._send(leg, answer)
        return leg

    def _follow(self, changed: list[Leg]) -> None:
        """Have the routes follow what legs became."""
        if not changed:
            return
        self._keeper.hops = self._legs.hops(self._records)
        self._unsettled.set()
        now = time.monotonic()
        for used, what in ((True, "direct"), (False, "into the tunnel")):
            legs = [f"{leg.gateway} ({leg.way(now).why})" for leg in changed if leg.used == used]
            if legs:
                log.info("%s goes what is behind %s", what, some(legs))


class _Sockets:
    """One for each IP version of our gateways on each link in use."""

    def __init__(
        self, gateways: Mapping[int, Address], port: int, read: Callable[[socket.socket, str], None]
    ) -> None:
        self.faults: dict[str, str] = {}
        """By link, why it has none."""
        self._gateways = gateways
        self._port = port
        self._read = read
        self._open: dict[str, tuple[int, dict[int, socket.socket]]] = {}

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.keep({})

    def __iter__(self) -> Iterator[tuple[socket.socket, str]]:
        """Each with its link."""
        for link, (_, sockets) in self._open.items():
            for sock in sockets.values():
                yield sock, link

    def get(self, version: int, link: str) -> socket.socket | None:
        return self._open[link][1].get(version) if link in self._open else None

    def keep(self, links: Mapping[int, str]) -> None:
        """Have sockets on these links, by index, and on no others."""
        wanted = {name: index for index, name in links.items()}
        for link, (index, sockets) in list(self._open.items()):
            if wanted.get(link) != index:
                del self._open[link]
                for sock in sockets.values():
                    asyncio.get_running_loop().remove_reader(sock)
                    sock.close()
        for link in wanted.keys() - self._open.keys():
            try:
                self._open[link] = wanted[link], self._listen(link)
                self.faults.pop(link, None)
            except OSError as error:
                fault = f"UDP port {self._port} cannot be had on {link}: {error.strerror}"
                if self.faults.get(link) != fault:
                    log.error("nobody is reached directly: %s", fault)
                self.faults[link] = fault

    def _listen(self, link: str) -> dict[int, socket.socket]:
        opened: dict[int, socket.socket] = {}
        with ExitStack() as undo:
            for version, gateway in self._gateways.items():
                opened[version] = sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
                undo.callback(sock.close)
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.encode())
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
                if version == 4:
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, HOP_LIMIT)
                    sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, HOP_LIMIT)
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
                sock.bind((str(gateway), self._port))
            undo.pop_all()
        for sock in opened.values():
            asyncio.get_running_loop().add_reader(sock, self._read, sock, link)
        return opened
