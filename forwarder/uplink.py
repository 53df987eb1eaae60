"""The uplink: a TAP that takes superframes inside their tunnel, so that the kernel or the card cuts them
as it cuts its own tunnels' (UDP tunnel GSO, Linux 6.17). The host routes what is written to it.

It is used only after a superframe has really come out of this host cut and correct: kernels, firewalls
and sysctls each have a way to lose it. Netlink here blocks; not on the event loop's thread.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from fastpath.kernel.tap import TUNNEL_VNET_HEADER_SIZE, VNET_HEADER_SIZE, set_offloads, set_vnet_header_size
from fastpath.offload import segment, tunnel, virtio
from fastpath.wire import geneve
from fastpath.wire.checksum import checksum
from forwarder.addresses import Address
from forwarder.links import SYSCTL_ROOT, LinkError, add_address, ipv6_available, open_device, route_to

PROBE_ADDRESSES: Final = {4: ip_address("169.254.71.2"), 6: ip_address("100::7071")}
"""Where the self-test's superframe is sent: a link-local address beside the virtual router's, and one of
the discard-only prefix (RFC 6666). Each leads to the probe TAP while the test runs and nowhere else."""

UPLINK_ADDRESS: Final = ip_address("169.254.71.3")

PROBE_SECONDS: Final = 0.5
PROBE_PORT: Final = 6081
PROBE_MAC: Final = bytes.fromhex("02706c000001")
PROBE_PAYLOAD: Final = bytes(range(256)) * 12
PROBE_SEGMENT_BYTES: Final = 1300


class UplinkError(RuntimeError):
    """The uplink is not usable; the text says why."""


@dataclass(frozen=True, slots=True)
class Uplink:
    device: Any
    mac: bytes

    def fileno(self) -> int:
        return int(self.device.fileno())

    def close(self) -> None:
        self.device.close()


def open_uplink(name: str, node_id: str, endpoints: Iterable[Address]) -> Uplink:
    """A tested uplink for datagrams from these addresses. UplinkError if the host cannot have one."""
    try:
        device = open_device(name, node_id)
    except LinkError as error:
        raise UplinkError(str(error)) from error
    try:
        _set_up(name, device)
        uplink = Uplink(device, bytes(device.hwaddr))
        for endpoint in endpoints:
            _test(uplink, name, node_id, endpoint)
    except BaseException:
        device.close()
        raise
    return uplink


def _set_up(name: str, device: Any) -> None:
    try:
        set_vnet_header_size(device.fileno(), TUNNEL_VNET_HEADER_SIZE)
        set_offloads(device.fileno(), checksum=True, tso=True, uso=False, udp_tunnel=True)
    except OSError as error:
        raise UplinkError(
            f"this kernel's TAP takes no tunnel superframes (Linux 6.17): {error.strerror}"
        ) from None
    sysctls = {
        # What is written has this host's own source address, which would look spoofed.
        f"net/ipv4/conf/{name}/accept_local": "1",
        # Loose: the greater of `all` and the link's own counts, so 0 would not win. A link without an
        # address lets nothing pass a loose filter, so it has one.
        f"net/ipv4/conf/{name}/rp_filter": "2",
    }
    if ipv6_available():
        sysctls |= {f"net/ipv6/conf/{name}/accept_ra": "0", f"net/ipv6/conf/{name}/addr_gen_mode": "1"}
    for path, value in sysctls.items():
        try:
            (SYSCTL_ROOT / path).write_text(value)
        except OSError as error:
            raise UplinkError(f"sysctl {path.replace('/', '.')} cannot be set: {error.strerror}") from None
    add_address(name, UPLINK_ADDRESS)
    device.up()


def _test(uplink: Uplink, name: str, node_id: str, endpoint: Address) -> None:
    """Send one superframe through the host to a TAP that takes none, and compare what arrives there with
    what we would have cut ourselves."""
    offload, frame = _probe_superframe()
    destination = PROBE_ADDRESSES[endpoint.version]
    whole = tunnel.wrap(
        offload,
        frame,
        tunnel=geneve.encode(0),
        source=endpoint.packed,
        source_port=PROBE_PORT,
        destination=destination.packed,
        destination_port=PROBE_PORT,
        uplink_mac=uplink.mac,
    )
    cut = segment.cut(offload, frame)
    assert isinstance(whole, bytes)  # noqa: S101 (the probe is ours)
    assert isinstance(cut, list)  # noqa: S101
    expected = [geneve.encode(0) + piece for piece in cut]
    with _probe(f"{name[:13]}-p", node_id, destination) as probe:
        try:
            os.write(uplink.fileno(), whole)
        except OSError as error:
            raise UplinkError(f"this kernel refuses tunnel superframes: {error.strerror}") from None
        arrived = list(_datagrams(probe, len(expected)))
    if not arrived:
        raise UplinkError(
            f"a test superframe from {endpoint} did not come through this host: does a firewall drop what is "
            "forwarded?"
        )
    if arrived != expected:
        raise UplinkError("this kernel cuts tunnel superframes wrongly")


@contextmanager
def _probe(name: str, node_id: str, destination: Address) -> Iterator[int]:
    """A TAP that is offered nothing but whole packets, and the route to it."""
    try:
        device = open_device(name, node_id)
        try:
            set_offloads(device.fileno(), checksum=False, tso=False, uso=False)
            device.up()
            route_to(name, destination, PROBE_MAC)
            yield device.fileno()
        finally:
            device.close()
    except LinkError as error:
        raise UplinkError(f"the uplink cannot be tested: {error}") from error


def _datagrams(probe: int, count: int) -> Iterator[bytes]:
    """The payloads of up to `count` correct UDP datagrams to PROBE_PORT, in the time there is."""
    deadline = time.monotonic() + PROBE_SECONDS
    while count:
        ready, _, _ = select.select([probe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        packet = os.read(probe, 65536)[VNET_HEADER_SIZE + 14 :]
        payload = _payload(packet)
        if payload is not None:
            yield payload
            count -= 1


def _payload(packet: bytes) -> bytes | None:
    """What a UDP datagram to PROBE_PORT carries; None if the packet is something else or not correct."""
    if packet[0] >> 4 == 4:
        header, addresses, protocol = (packet[0] & 15) * 4, packet[12:20], packet[9]
    else:
        header, addresses, protocol = 40, packet[8:40], packet[6]
    datagram = packet[header:]
    if protocol != 17 or len(datagram) < 8 or struct.unpack("!H", datagram[2:4])[0] != PROBE_PORT:
        return None
    pseudo_header = addresses + struct.pack("!HH", protocol, len(datagram))
    return datagram[8:] if checksum(pseudo_header + datagram) == 0 else None


def _probe_superframe() -> tuple[bytes, bytes]:
    """A TCP superframe of three segments with its virtio header; nobody's addresses (RFC 5737)."""
    tcp = struct.pack("!HHIIBBHHH", 1, 1, 0, 0, 5 << 4, 0x10, 1, 0, 0)
    length = len(tcp) + len(PROBE_PAYLOAD)
    addresses = bytes([192, 0, 2, 1, 192, 0, 2, 2])
    partial = ~checksum(addresses + struct.pack("!HH", 6, length)) & 0xFFFF
    tcp = tcp[:16] + struct.pack("!H", partial) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0) + addresses
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    offload = virtio.VirtioHeader(1, 1, 54, PROBE_SEGMENT_BYTES, 34, 16)
    return virtio.encode(offload), PROBE_MAC + PROBE_MAC + b"\x08\x00" + ip + tcp + PROBE_PAYLOAD
