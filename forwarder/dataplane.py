"""The fast path on the event loop: its descriptors, its tables, its counters. The only importer of fastpath.

One wake is one turn of the pump, which moves bounded batches both ways without the GIL, and lingers a
moment for more; no packet ever becomes a Python object.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from fastpath.kernel.tap import VNET_HEADER_SIZE, set_offloads, set_vnet_header_size
from fastpath.kernel.udp import open_receiver, open_sender, set_gro
from fastpath.pump import Pump
from fastpath.table import LOCAL_SLOT, MAX_PEERS, PeerTable, PrefixTable
from forwarder.addresses import Address, Network
from forwarder.offloads import ABOUT, Offload, judge
from forwarder.peers import (
    AllowSource,
    Change,
    ClearSlot,
    ForgetSource,
    InsertPrefix,
    RemovePrefix,
    SetPath,
)
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
        self._receivers: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted = dict.fromkeys(ABOUT, False)
        self._refusals: dict[str, str] = {}
        self._uplink_fault: str | None = "switched off when podloom started"
        self._descriptors = ExitStack()
        with ExitStack() as undo:
            undo.enter_context(self._descriptors)
            self._pump = self._open(settings)
            for name, on in settings.offloads.items():
                self.set_offload(name, on)
            undo.pop_all()

    def _open(self, settings: Settings) -> Pump:
        try:
            set_vnet_header_size(self._tap_fd, VNET_HEADER_SIZE)
            set_offloads(self._tap_fd, checksum=True, tso=False, uso=False)  # switched on one by one
        except OSError as error:
            raise DataPlaneError(f"the TAP refuses virtio headers: {error.strerror}") from error
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
        for endpoint in settings.endpoints:
            for port, encapsulation in settings.listen:
                descriptor = self._open_receiver(endpoint, port)
                pump.add_receiver(descriptor, encapsulation)
                self._receivers.append(descriptor)
            for _ in range(SENDERS_PER_FAMILY):
                pump.add_sender(self._own(open_sender(str(endpoint))), FAMILY[endpoint.version])
        return pump

    def _open_receiver(self, endpoint: Address, port: int) -> int:
        try:
            return self._own(open_receiver(str(endpoint), port, gro=False))
        except OSError as error:
            raise DataPlaneError(
                f"cannot listen on {endpoint} UDP port {port}: {error.strerror}; is another tunnel on this "
                "host using it? See tunnel.geneve_port and tunnel.vxlan_ports"
            ) from error

    def _own(self, descriptor: int) -> int:
        self._descriptors.callback(os.close, descriptor)
        return descriptor

    def start(self) -> None:
        """Forward whatever arrives from now on, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pump.fileno(), self._turn)

    def _turn(self) -> None:
        try:
            self._pump.turn(IDLE_MICROSECONDS)
        except OSError as error:
            # Such a descriptor stays readable and useless, as a TAP does whose link was deleted: going on
            # would only spin.
            self._stop()
            self._on_failure(DataPlaneError(f"the data plane stopped: {error.strerror}; start podloom again"))
            return
        if probes := self._pump.take_probes():
            self.on_probes(probes)

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._pump.fileno())
            self._loop = None

    def close(self) -> None:
        """Stop forwarding and give the sockets back; the TAP stays open."""
        self._stop()
        self._descriptors.close()

    def apply(self, changes: Iterable[Change]) -> None:
        """Change the tables between two batches; no packet sees half of it."""
        apply_changes(changes, self._prefixes, self._peers)

    def send_probe(self, slot: int, flow: int, probe: bytes, packet_bytes: int) -> bool:
        """Send a probe to the slot's peer as a packet of that flow would go, with zeroes behind it until the
        inner packet has so many bytes; whether the kernel took it."""
        return self._pump.send_probe(slot, flow, probe, packet_bytes)

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
            elif name == "udp_gro":
                for descriptor in self._receivers:
                    set_gro(descriptor, on)
            else:
                self._pump.set_offload(name, on)
        except OSError as error:
            self._refusals[name] = f"refused by the kernel: {error.strerror}"
        return self.offloads()[name]

    def take_uplink(self, uplink: Uplink) -> None:
        """Send TCP superframes through it from now on. Borrowed."""
        self._pump.set_uplink(uplink.fileno(), uplink.mac)
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
                )
            case AllowSource(address, slot):
                peers.allow_source(address.packed, slot)
            case InsertPrefix(prefix, slot):
                prefixes.insert(prefix.network_address.packed, prefix.prefixlen, slot)
