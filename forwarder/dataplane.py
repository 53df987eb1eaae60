"""The fast path on the event loop: its descriptors, its tables, its counters. The only importer of fastpath.

One wake is one turn of the pump, which moves bounded batches both ways without the GIL, and lingers a
moment for more; no packet ever becomes a Python object.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from fastpath.kernel.tap import VNET_HEADER_SIZE, set_offloads, set_vnet_header_size
from fastpath.kernel.udp import open_receiver, open_sender, set_gro
from fastpath.pump import Pump
from fastpath.table import LOCAL_SLOT, MAX_PEERS, PeerTable, PrefixTable
from fastpath.wire import geneve, vxlan
from forwarder.addresses import Address, Network
from forwarder.delivery import Delivery
from forwarder.offloads import ABOUT, Offload, judge
from forwarder.peers import (
    AllowSource,
    Change,
    ClearSlot,
    ForgetSource,
    InsertPrefix,
    PeerPath,
    RemovePrefix,
    SetPath,
)
from forwarder.probe import probe_frame
from forwarder.uplink import Uplink

SENDERS_PER_FAMILY: Final = 8
"""Source ports that inner flows are spread over: enough for the underlay's multipath and the receivers'
queues, few enough that flows of one peer still meet in one run."""

IDLE_MICROSECONDS: Final = 100
"""How long one turn of the pump waits for the next packet before it gives the loop back. While packets
come faster than that, they are moved without waking the interpreter for each."""

MAX_SLOTS: Final = MAX_PEERS

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class DataPlaneError(RuntimeError):
    """A descriptor cannot be opened or has become useless; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the fast path is told once. `listen` is (UDP port, encapsulation)."""

    router_mac: bytes
    gateway_mac: bytes
    vni: int
    prefixes: tuple[Network, ...]
    endpoints: tuple[Address, ...]
    listen: tuple[tuple[int, str], ...]
    vxlan_reserved_bits: str
    mtu_bytes: int
    offloads: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Sockets:
    """Of one endpoint: a receiver for each of `Settings.listen`, and the senders."""

    receivers: tuple[int, ...]
    senders: tuple[int, ...]

    def close(self) -> None:
        for descriptor in (*self.receivers, *self.senders):
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class RoamingProbe:
    """Where a probe came from: the slot that has the address, if any, its encapsulation, outer address and
    outer port."""

    slot: int | None
    encapsulation: str
    address: Address
    port: int
    probe: bytes


class DataPlane:
    """Open it, `start` it on the running loop, `apply` changes of peers, `close` it."""

    def __init__(self, settings: Settings, tap_fd: int, on_failure: Callable[[DataPlaneError], None]) -> None:
        """`tap_fd` is borrowed. `on_failure` is called once if a descriptor breaks for good. `on_probes` is
        called with what probes were heard: slot of the peer, probe."""
        self._tap_fd = tap_fd
        self._on_failure = on_failure
        self.on_probes: Callable[[Sequence[tuple[int, bytes]]], None] = ignore
        self._prefixes = PrefixTable()
        self._peers = PeerTable()
        self._settings = settings
        self._sockets: dict[Address, Sockets] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broken = False
        self._wanted = dict.fromkeys(ABOUT, False)
        self._refusals: dict[str, str] = {}
        self._uplink: Uplink | None = None
        self._uplink_fault: str | None = "switched off when podloom started"
        self._descriptors = ExitStack()
        with ExitStack() as undo:
            undo.enter_context(self._descriptors)
            self._pump = self._open(settings)
            self._delivery = Delivery(tap_fd, lambda: self._pump.moved_bytes)
            for name, on in settings.offloads.items():
                self.set_offload(name, on)
            undo.pop_all()

    def _open(self, settings: Settings) -> Pump:
        prepare_tap(self._tap_fd)
        pump = Pump(
            tap_fd=self._tap_fd,
            vnet_header_size=VNET_HEADER_SIZE,
            router_mac=settings.router_mac,
            gateway_mac=settings.gateway_mac,
            vni=settings.vni,
            prefixes=self._prefixes,
            peers=self._peers,
            vxlan_reserved_bits=settings.vxlan_reserved_bits,
            mtu=settings.mtu_bytes,
        )
        for prefix in settings.prefixes:
            self._prefixes.insert(prefix.network_address.packed, prefix.prefixlen, LOCAL_SLOT)
        self._descriptors.callback(self._close_sockets)
        for endpoint in settings.endpoints:
            self._sockets[endpoint] = open_sockets(endpoint, settings.listen)
        self._use_sockets(pump)
        return pump

    def _use_sockets(self, pump: Pump) -> None:
        for endpoint, sockets in self._sockets.items():
            for descriptor, (_, encapsulation) in zip(sockets.receivers, self._settings.listen, strict=True):
                pump.add_receiver(descriptor, encapsulation)
            for descriptor in sockets.senders:
                pump.add_sender(descriptor, FAMILY[endpoint.version])

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.popitem()[1].close()

    @property
    def endpoints(self) -> tuple[Address, ...]:
        """Those it sends from and listens on."""
        return tuple(self._sockets)

    def move(self, endpoints: tuple[Address, ...]) -> None:
        """Send from and listen on these addresses, and on no others. DataPlaneError, and no change, if that
        cannot be."""
        opened: dict[Address, Sockets] = {}
        try:
            for endpoint in endpoints:
                if endpoint not in self._sockets:
                    opened[endpoint] = open_sockets(endpoint, self._settings.listen)
        except DataPlaneError:
            for sockets in opened.values():
                sockets.close()
            raise
        before, self._sockets = self._sockets, {}
        for endpoint in endpoints:
            self._sockets[endpoint] = opened[endpoint] if endpoint in opened else before.pop(endpoint)
        self._pump.forget_sockets()
        self._use_sockets(self._pump)
        for sockets in before.values():
            sockets.close()
        self.set_offload("udp_gro", self._wanted["udp_gro"])
        if self._uplink is not None:
            used = self._pump.offloads["uplink"]
            self._pump.set_uplink(self._uplink.fileno(), self._uplink.mac)
            self._pump.set_offload("uplink", used)

    def resize(self, mtu_bytes: int) -> None:
        """The pods' MTU is another now."""
        self._pump.set_mtu(mtu_bytes)

    def replace_tap(self, tap_fd: int) -> None:
        """Go on with this TAP under the old one's descriptor, after which `tap_fd` may be closed."""
        prepare_tap(tap_fd)
        running = self._loop is not None
        self._stop()
        os.dup2(tap_fd, self._tap_fd, inheritable=False)
        self._pump.watch_tap()
        self._delivery.forget()
        for name in ("tso", "uso", "threaded_napi"):
            self.set_offload(name, self._wanted[name])
        if running or self._broken:
            self.start()

    def start(self) -> None:
        """Forward whatever arrives from now on, on the running loop."""
        self._broken = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pump.fileno(), self._turn)

    def _turn(self) -> None:
        try:
            self._pump.turn(IDLE_MICROSECONDS)
        except OSError as error:
            # Such a descriptor stays readable and useless, as a TAP does whose link was deleted: going on
            # would only spin.
            self._stop()
            self._broken = True
            self._on_failure(DataPlaneError(f"the data plane stopped: {error.strerror}; start podloom again"))
            return
        self._delivery.turned()
        if probes := self._pump.take_probes():
            self.on_probes(probes)

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._pump.fileno())
            self._loop = None

    def close(self) -> None:
        """Stop forwarding and give the sockets back; the TAP stays open."""
        self._stop()
        self._delivery.stop()
        self._descriptors.close()

    def apply(self, changes: Iterable[Change]) -> None:
        """Change the tables between two batches; no packet sees half of it."""
        apply_changes(changes, self._prefixes, self._peers)

    def send_probe(self, slot: int, flow: int, probe: bytes, packet_bytes: int) -> bool:
        """Send a probe to the slot's peer as a packet of that flow would go, with zeroes behind it until the
        inner packet has so many bytes; whether the kernel took it."""
        return self._pump.send_probe(slot, flow, probe, packet_bytes)

    def hear_roaming(self) -> None:
        """Hear roaming probes from now on, from whomever; `take_roaming` must be called often."""
        self._pump.hear_roaming(True)

    def take_roaming(self) -> list[RoamingProbe]:
        """What was heard since the last call."""
        return [
            RoamingProbe(None if slot < 0 else slot, encapsulation, ip_address(address), port, probe)
            for slot, encapsulation, address, port, probe in self._pump.take_roaming_probes()
        ]

    def send_from_home(self, path: PeerPath, address: Address, port: int, probe: bytes) -> None:
        """Send a probe to a peer of that path, at this address and port, from the port that we receive what
        is encapsulated so on. What the kernel refuses is lost."""
        if path.encapsulation == "geneve":
            header = geneve.encode(path.vni, control=True)
        else:
            header = vxlan.encode(path.vni)
        descriptor = self._home(path.encapsulation, address.version)
        if descriptor is not None:
            frame = probe_frame(path.router_mac, self._settings.router_mac, probe)
            with socket.socket(fileno=os.dup(descriptor)) as home, suppress(OSError):
                home.sendto(header + frame, (str(address), port))

    def _home(self, encapsulation: str, version: int) -> int | None:
        """The receiver of that encapsulation and IP version; the first, if there are several."""
        for endpoint, sockets in self._sockets.items():
            for descriptor, (_, its) in zip(sockets.receivers, self._settings.listen, strict=True):
                if (its, endpoint.version) == (encapsulation, version):
                    return descriptor
        return None

    def owner_of(self, address: Address) -> int | None:
        """The slot whose datagrams may come from an outer address."""
        return self._peers.find_source(address.packed)

    def set_offload(self, name: str, on: bool) -> Offload:
        """Switch one of `offloads.ABOUT` and say what came of it. KeyError if there is none of that name.

        Switching on tries again what the kernel refused before."""
        self._wanted[name] = on if name in ABOUT else self._wanted[name]
        self._refusals.pop(name, None)
        try:
            if name in ("tso", "uso"):
                set_offloads(self._tap_fd, checksum=True, tso=self._uses("tso"), uso=self._uses("uso"))
            elif name == "uplink":
                self._switch_uplink(on)
            elif name == "threaded_napi":
                self._delivery.allow(on)
            elif name == "udp_gro":
                for sockets in self._sockets.values():
                    for descriptor in sockets.receivers:
                        set_gro(descriptor, on)
            else:
                self._pump.set_offload(name, on)
        except OSError as error:
            self._refusals[name] = f"refused by the kernel: {error.strerror}"
        return self.offloads()[name]

    def take_uplink(self, uplink: Uplink) -> None:
        """Send TCP superframes through it from now on. Borrowed."""
        self._pump.set_uplink(uplink.fileno(), uplink.mac)
        self._uplink = uplink
        self._uplink_fault = None
        self._wanted["uplink"] = True

    def forgo_uplink(self, reason: str) -> None:
        """Say why there is none."""
        self._uplink_fault = reason
        self._wanted["uplink"] = True

    def _switch_uplink(self, on: bool) -> None:
        if self._uplink_fault is not None:
            self._refusals["uplink"] = self._uplink_fault
        else:
            self._pump.set_offload("uplink", on)

    def _uses(self, name: str) -> bool:
        return self._wanted[name] and name not in self._refusals

    def offloads(self) -> dict[str, Offload]:
        """Each of `offloads.ABOUT`. One that the pump had to give up while forwarding is off, too."""
        given_up = {
            name: "refused by the kernel while forwarding"
            for name, on in self._pump.offloads.items()
            if self._wanted[name] and not on
        }
        refusals = {**given_up, **self._refusals}
        if self._uplink_fault is not None:
            refusals["uplink"] = self._uplink_fault
        if self._delivery.refusal is not None:
            refusals["threaded_napi"] = self._delivery.refusal
        return {name: judge(self._wanted[name], refusals.get(name)) for name in ABOUT}

    def counters(self) -> dict[str, dict[str, int]]:
        """By direction: packets and bytes. Why packets were dropped is in `drops`."""
        return {
            direction: {name: value for name, value in counters.items() if isinstance(value, int)}
            for direction, counters in self._pump.counters().items()
        }

    def drops(self) -> dict[str, dict[str, int]]:
        """By direction and reason, every reason present."""
        return self._pump.drops()

    def peer_counters(self, slot: int) -> Mapping[str, int]:
        return self._peers.counters(slot)


def ignore(probes: Sequence[tuple[int, bytes]]) -> None:
    """Probes that nobody wants."""


def prepare_tap(tap_fd: int) -> None:
    """DataPlaneError if the TAP cannot be used."""
    try:
        set_vnet_header_size(tap_fd, VNET_HEADER_SIZE)
        set_offloads(tap_fd, checksum=True, tso=False, uso=False)  # switched on one by one
    except OSError as error:
        raise DataPlaneError(f"the TAP refuses virtio headers: {error.strerror}") from error


def open_sockets(endpoint: Address, listen: Iterable[tuple[int, str]]) -> Sockets:
    """DataPlaneError, and nothing left open, if one cannot be had."""
    with ExitStack() as undo:

        def own(descriptor: int) -> int:
            undo.callback(os.close, descriptor)
            return descriptor

        receivers = []
        for port, _ in listen:
            try:
                receivers.append(own(open_receiver(str(endpoint), port, gro=False)))
            except OSError as error:
                hint = (
                    "correct node.endpoints or add it"
                    if error.errno == errno.EADDRNOTAVAIL
                    else "is another tunnel on this host using it? See tunnel.geneve_port and "
                    "tunnel.vxlan_ports"
                )
                raise DataPlaneError(
                    f"cannot listen on {endpoint} UDP port {port}: {error.strerror}; {hint}"
                ) from error
        try:
            senders = tuple(own(open_sender(str(endpoint))) for _ in range(SENDERS_PER_FAMILY))
        except OSError as error:
            raise DataPlaneError(f"cannot send from {endpoint}: {error.strerror}") from error
        undo.pop_all()
    return Sockets(tuple(receivers), senders)


def apply_changes(changes: Iterable[Change], prefixes: PrefixTable, peers: PeerTable) -> None:
    for change in changes:
        match change:
            case ForgetSource(address):
                peers.forget_source(address.packed)
            case RemovePrefix(prefix):
                prefixes.remove(prefix.network_address.packed, prefix.prefixlen)
            case ClearSlot(slot):
                peers.clear(slot)
            case SetPath(slot, path):
                peers.set(
                    slot,
                    encapsulation=path.encapsulation,
                    vni=path.vni,
                    router_mac=path.router_mac,
                    endpoint=path.endpoint.packed,
                    port=path.port,
                    mtu=path.mtu_bytes,
                    partial_checksums=path.partial_checksums,
                    from_home=path.from_home,
                )
            case AllowSource(address, slot):
                peers.allow_source(address.packed, slot)
            case InsertPrefix(prefix, slot):
                prefixes.insert(prefix.network_address.packed, prefix.prefixlen, slot)
