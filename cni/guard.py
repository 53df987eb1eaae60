"""What a pod may send, as an eBPF program for the host end of its veth. Pure.

Everything is dropped but frames with the pod's own MAC that are honest ARP, or IPv4 or IPv6 from its own
addresses and not a router's, a neighbour's, a DHCP server's or a tunnel endpoint's words. eBPF, because it
lives and dies with the link: there is no rule set that could be flushed, or outlive the pod.

Sources: linux/bpf.h (struct __sk_buff, helper bpf_skb_load_bytes), RFC 826, 791, 8200, 4861, 6980, 7112.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cni.ipam import IpAddress, IpNetwork

ACCEPT, DROP = -1, 2  # TCX_NEXT (TC_ACT_UNSPEC): what comes next decides; TCX_DROP (TC_ACT_SHOT)

_INSTRUCTION = struct.Struct("=BBhi")
_SKB_LEN, _SKB_VLAN_PRESENT = 0, 20
_LOAD_BYTES = 26  # BPF_FUNC_skb_load_bytes
_FRAME, _HEADER, _FIELD = -64, -48, -8  # our stack: the Ethernet header, the IP header, anything else
_LOADS = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}  # BPF_LDX | BPF_MEM, by size in bytes
_RESULT, _SKB, _AT, _NEXT, _UNSPECIFIED = 0, 6, 7, 8, 9  # registers
_ETHERNET = 14  # bytes
_EXTENSIONS_MAX = 6  # IPv6 extension headers walked; a chain that is longer is dropped

_UDP, _ICMP, _ICMP6 = 17, 1, 58
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_ICMP_REDIRECT, _ICMP_ROUTER = 5, 9
_MLD_QUERY, _MLD_REPORT, _MLD_DONE, _MLD2_REPORT = 130, 131, 132, 143
_ROUTER_SOLICITATION, _ROUTER_ADVERTISEMENT, _REDIRECT, _RENUMBERING = 133, 134, 137, 138
_SOLICITATION, _ADVERTISEMENT = 135, 136
_OPTION_SOURCE_MAC, _OPTION_TARGET_MAC, _OPTION_NONCE = 1, 2, 14
_DHCP = {4: (67, 68), 6: (547, 546)}  # server's, client's port


@dataclass(frozen=True)
class Allowance:
    """Who the pod is. Datagrams to `tunnel_ports` may go to pods only, that is into `cluster_cidrs`.

    A `dhcp_client` may also ask for an address, or again for its own, without one (RFC 2131 section 4.1).
    """

    mac: str
    addresses: tuple[IpAddress, ...]
    cluster_cidrs: tuple[IpNetwork, ...]
    tunnel_ports: tuple[int, ...]
    dhcp_client: bool = False

    def of(self, version: int) -> list[bytes]:
        own = [address.packed for address in self.addresses if address.version == version]
        return [*own, _link_local(self.mac)] if own and version == 6 else own


def program(pod: Allowance) -> bytes:
    """The instructions, for a traffic control hook at the ingress of the host end."""
    code = _Assembler()
    mac = bytes.fromhex(pod.mac.replace(":", ""))
    code.move(_SKB, 1)
    code.load(4, 2, _SKB, _SKB_VLAN_PRESENT)
    code.jump_unless(2, 0, "drop")
    code.fetch(_FRAME, _ETHERNET, at=0)
    code.require(_FRAME + 6, mac, "drop")
    code.load(2, 2, 10, _FRAME + 12)
    for ethertype, label, needed in ((0x0806, "arp", 4), (0x0800, "ipv4", 4), (0x86DD, "ipv6", 6)):
        if pod.of(needed):
            code.jump_if(2, _native(ethertype.to_bytes(2, "big")), label)
    code.jump("drop")
    if pod.of(4):
        _arp(code, pod, mac)
        _ipv4(code, pod)
    if pod.of(6):
        _ipv6(code, pod, mac)
    code.label("accept")
    code.leave(ACCEPT)
    code.label("drop")
    code.leave(DROP)
    return code.assembled()


def _arp(code: _Assembler, pod: Allowance, mac: bytes) -> None:
    code.label("arp")
    code.fetch(_HEADER, 28, at=_ETHERNET)
    code.require(_HEADER, bytes.fromhex("000108000604"), "drop")  # Ethernet and IPv4
    code.require(_HEADER + 8, mac, "drop")
    code.jump_if_one_of(_HEADER + 14, pod.of(4), "accept", step=2)
    code.jump("drop")


def _ipv4(code: _Assembler, pod: Allowance) -> None:
    code.label("ipv4")
    code.fetch(_HEADER, 20, at=_ETHERNET)
    code.jump_if_one_of(_HEADER + 12, pod.of(4), "ipv4 own")
    if pod.dhcp_client:
        _dhcp_client(code)
    else:
        code.jump("drop")
    code.label("ipv4 own")
    code.load(2, 2, 10, _HEADER + 6)
    code.mask(2, _native(b"\x1f\xff"))
    code.jump_unless(2, 0, "accept")  # a later fragment is nothing without the first
    code.load(1, _AT, 10, _HEADER)
    code.mask(_AT, 0x0F)
    code.shift_left(_AT, 2)
    code.add(_AT, _ETHERNET)
    code.load(1, _NEXT, 10, _HEADER + 9)
    code.jump_if(_NEXT, _UDP, "udp4")
    code.jump_unless(_NEXT, _ICMP, "accept")
    code.fetch(_FIELD, 1)
    code.load(1, 2, 10, _FIELD)
    code.jump_if(2, _ICMP_REDIRECT, "drop")
    code.jump_if(2, _ICMP_ROUTER, "drop")
    code.jump("accept")
    _udp(code, pod, 4, _HEADER + 16)


def _dhcp_client(code: _Assembler) -> None:
    """From no address to all, client's to server's port, without options or fragments."""
    server, client = _DHCP[4]
    code.require(_HEADER + 12, bytes(4) + b"\xff" * 4, "drop")
    code.require(_HEADER, b"\x45", "drop")
    code.require(_HEADER + 9, bytes([_UDP]), "drop")
    code.load(2, 2, 10, _HEADER + 6)
    code.mask(2, _native(b"\x3f\xff"))
    code.jump_unless(2, 0, "drop")
    code.fetch(_FIELD, 4, at=_ETHERNET + 20)
    code.require(_FIELD, struct.pack("!HH", client, server), "drop")
    code.jump("accept")


def _ipv6(code: _Assembler, pod: Allowance, mac: bytes) -> None:
    code.label("ipv6")
    code.fetch(_HEADER, 40, at=_ETHERNET)
    code.set(_UNSPECIFIED, 0)
    code.jump_if_one_of(_HEADER + 8, pod.of(6), "ipv6 own")
    code.require(_HEADER + 8, bytes(16), "drop")
    code.set(_UNSPECIFIED, 1)
    code.label("ipv6 own")
    code.load(1, _NEXT, 10, _HEADER + 6)
    code.set(_AT, _ETHERNET + 40)
    for n in range(_EXTENSIONS_MAX):
        _ipv6_extension(code, n)
    for kind in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION):
        code.jump_if(_NEXT, kind, "drop")
    code.label("ipv6 payload")
    code.jump_if(_NEXT, _ICMP6, "icmp6")
    code.jump_unless(_UNSPECIFIED, 0, "drop")
    code.jump_if(_NEXT, _UDP, "udp6")
    code.jump("accept")
    _udp(code, pod, 6, _HEADER + 24)
    _icmp6(code, pod, mac)


def _ipv6_extension(code: _Assembler, n: int) -> None:
    """Step over one header, or leave for the payload. Lengths as in RFC 8200 section 4, RFC 4302."""
    for kind in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
        code.jump_if(_NEXT, kind, f"option {n}")
    code.jump_if(_NEXT, _FRAGMENT, f"fragment {n}")
    code.jump_unless(_NEXT, _AUTHENTICATION, "ipv6 payload")
    code.fetch(_FIELD, 2)
    code.load(1, _NEXT, 10, _FIELD)
    code.load(1, 2, 10, _FIELD + 1)
    code.add(2, 2)
    code.shift_left(2, 2)
    code.add_register(_AT, 2)
    code.jump(f"next {n}")
    code.label(f"option {n}")
    code.fetch(_FIELD, 2)
    code.load(1, _NEXT, 10, _FIELD)
    code.load(1, 2, 10, _FIELD + 1)
    code.add(2, 1)
    code.shift_left(2, 3)
    code.add_register(_AT, 2)
    code.jump(f"next {n}")
    code.label(f"fragment {n}")
    code.fetch(_FIELD, 4)
    code.load(1, _NEXT, 10, _FIELD)
    code.add(_AT, 8)
    code.load(2, 2, 10, _FIELD + 2)
    code.mask(2, _native(b"\xff\xf8"))
    code.jump_if(2, 0, f"next {n}")
    code.jump_unless(_UNSPECIFIED, 0, "drop")
    code.jump("accept")
    code.label(f"next {n}")


def _udp(code: _Assembler, pod: Allowance, version: int, destination: int) -> None:
    code.label(f"udp{version}")
    code.fetch(_FIELD, 4)
    server, client = _DHCP[version]
    code.load(4, 2, 10, _FIELD)
    code.jump_if_wide(2, _native(struct.pack("!HH", server, client)), "drop")
    code.load(2, 2, 10, _FIELD + 2)
    for port in pod.tunnel_ports:
        code.jump_if(2, _native(port.to_bytes(2, "big")), f"tunnel{version}")
    code.jump("accept")
    code.label(f"tunnel{version}")
    for n, cidr in enumerate(item for item in pod.cluster_cidrs if item.version == version):
        code.require_prefix(destination, cidr, f"not in {version}.{n}")
        code.jump("accept")
        code.label(f"not in {version}.{n}")
    code.jump("drop")


def _icmp6(code: _Assembler, pod: Allowance, mac: bytes) -> None:
    code.label("icmp6")
    code.fetch(_FIELD, 1)
    code.load(1, _NEXT, 10, _FIELD)
    code.jump_if(_NEXT, _SOLICITATION, "solicitation")
    for kind in (_ROUTER_SOLICITATION, _MLD_REPORT, _MLD_DONE, _MLD2_REPORT):
        code.jump_if(_NEXT, kind, "accept")
    code.jump_unless(_UNSPECIFIED, 0, "drop")
    code.jump_if(_NEXT, _ADVERTISEMENT, "about itself")
    for kind in (_ROUTER_ADVERTISEMENT, _REDIRECT, _RENUMBERING, _MLD_QUERY):
        code.jump_if(_NEXT, kind, "drop")
    code.jump("accept")

    code.label("solicitation")  # for anybody; before it has an address, only for its own
    code.jump_if(_UNSPECIFIED, 0, "neighbour options")
    code.label("about itself")
    code.fetch(_HEADER + 8, 16, beyond=8)
    code.jump_if_one_of(_HEADER + 8, pod.of(6), "neighbour options")
    code.jump("drop")

    code.label("neighbour options")  # none, or one: its own MAC, or a nonce (RFC 7527)
    code.load(4, 2, _SKB, _SKB_LEN)
    code.subtract_register(2, _AT)
    code.jump_if(2, 24, "accept")
    code.jump_unless(2, 32, "drop")
    code.fetch(_FIELD, 8, beyond=24)
    code.load(1, 2, 10, _FIELD)
    code.jump_if(2, _OPTION_NONCE, "accept")
    code.jump_if(2, _OPTION_SOURCE_MAC, "mac option")
    code.jump_unless(2, _OPTION_TARGET_MAC, "drop")
    code.label("mac option")
    code.require(_FIELD + 2, mac, "drop")
    code.jump("accept")


class _Assembler:
    """eBPF instructions with labels. A comparison is always of a whole register, zero extended."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, str]] = []  # opcode, registers, offset, immediate, label
        self._labels: dict[str, int] = {}

    def assembled(self) -> bytes:
        return b"".join(
            _INSTRUCTION.pack(opcode, registers, self._labels[label] - n - 1 if label else offset, immediate)
            for n, (opcode, registers, offset, immediate, label) in enumerate(self._code)
        )

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def _emit(
        self, opcode: int, to: int = 0, of: int = 0, offset: int = 0, immediate: int = 0, label: str = ""
    ) -> None:
        low, high = (to, of) if sys.byteorder == "little" else (of, to)
        self._code.append((opcode, high << 4 | low, offset, immediate, label))

    def move(self, to: int, of: int) -> None:
        self._emit(0xBF, to, of)

    def set(self, to: int, value: int) -> None:
        self._emit(0xB7, to, immediate=value)

    def set_wide(self, to: int, value: int) -> None:
        """Any 64 bits; two instructions."""
        low, high = struct.unpack("=ii", struct.pack("=II", value & 0xFFFFFFFF, value >> 32))
        self._emit(0x18, to, immediate=low)
        self._emit(0x00, immediate=high)

    def add(self, to: int, value: int) -> None:
        self._emit(0x07, to, immediate=value)

    def add_register(self, to: int, of: int) -> None:
        self._emit(0x0F, to, of)

    def subtract_register(self, to: int, of: int) -> None:
        self._emit(0x1F, to, of)

    def mask(self, to: int, value: int) -> None:
        self._emit(0x57, to, immediate=value)

    def shift_left(self, to: int, bits: int) -> None:
        self._emit(0x67, to, immediate=bits)

    def load(self, size: int, to: int, of: int, offset: int) -> None:
        self._emit(_LOADS[size], to, of, offset)

    def jump(self, label: str) -> None:
        self._emit(0x05, label=label)

    def jump_if(self, register: int, value: int, label: str) -> None:
        self._emit(0x15, register, immediate=value, label=label)

    def jump_unless(self, register: int, value: int, label: str) -> None:
        self._emit(0x55, register, immediate=value, label=label)

    def jump_if_wide(self, register: int, value: int, label: str) -> None:
        """An immediate is sign extended, so a value with the 32nd bit needs a register."""
        self.set_wide(1, value)
        self._emit(0x1D, register, 1, label=label)

    def leave(self, value: int) -> None:
        self.set(_RESULT, value)
        self._emit(0x95)

    def fetch(self, to: int, size: int, *, at: int | None = None, beyond: int = 0) -> None:
        """`size` bytes of the frame at `at`, or `beyond` the register _AT, to the stack; drop if absent."""
        self.move(1, _SKB)
        if at is None:
            self.move(2, _AT)
            self.add(2, beyond)
        else:
            self.set(2, at)
        self.move(3, 10)
        self.add(3, to)
        self.set(4, size)
        self._emit(0x85, immediate=_LOAD_BYTES)
        self.jump_unless(_RESULT, 0, "drop")

    def require(self, at: int, value: bytes, otherwise: str, step: int = 8) -> None:
        """Go on when the stack at `at` holds `value`; read in naturally aligned pieces of up to `step`."""
        while value:
            size = next(n for n in (8, 4, 2, 1) if n <= min(step, len(value)) and at % n == 0)
            self.load(size, 2, 10, at)
            self.set_wide(1, _native(value[:size]))
            self._emit(0x5D, 2, 1, label=otherwise)
            at, value = at + size, value[size:]

    def require_prefix(self, at: int, prefix: IpNetwork, otherwise: str) -> None:
        whole, bits = divmod(prefix.prefixlen, 8)
        packed = prefix.network_address.packed
        self.require(at, packed[:whole], otherwise)
        if bits:
            self.load(1, 2, 10, at + whole)
            self.mask(2, 0xFF << (8 - bits) & 0xFF)
            self.jump_unless(2, packed[whole], otherwise)

    def jump_if_one_of(self, at: int, values: Sequence[bytes], label: str, step: int = 8) -> None:
        for n, value in enumerate(values):
            otherwise = f"{len(self._code)}: not value {n}"
            self.require(at, value, otherwise, step)
            self.jump(label)
            self.label(otherwise)


def _link_local(mac: str) -> bytes:
    """fe80::/64 with the modified EUI-64 of `mac`: RFC 4291 appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]


def _native(data: bytes) -> int:
    """What the CPU reads where `data` lies in memory."""
    return int.from_bytes(data, sys.byteorder)
