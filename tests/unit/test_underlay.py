from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from forwarder.addresses import Address
from forwarder.underlay import AUTO, Device, Host, UnderlayError, device_mtus, endpoints_of

CLUSTER = (ip_network("10.42.0.0/16"), ip_network("fd42::/48"))


def device(name: str, *addresses: str, mtu: int = 1500, loopback: bool = False) -> Device:
    return Device(name, mtu, loopback, tuple(map(ip_address, addresses)))


ETH0 = device("eth0", "192.0.2.1", "192.0.2.9", "2001:db8::1")
ETH1 = device("eth1", "198.51.100.1", mtu=9000)
ETH2 = device("eth2", "2001:db8::2")
LO = device("lo", "203.0.113.1", loopback=True)
BRIDGE = device("loom0", "10.42.1.1")
HOST = Host((LO, ETH0, ETH1, ETH2, BRIDGE), {4: "eth1", 6: "eth2"})

CHOSEN: dict[str, tuple[str, Host, tuple[str, ...], str]] = {
    "the device's IPv4 address": ("eth0", HOST, (), "192.0.2.1"),
    "its IPv6 address without an IPv4 one": ("eth2", HOST, (), "2001:db8::2"),
    "the default route's device": (AUTO, HOST, (), "198.51.100.1"),
    "IPv6's default route alone": (AUTO, Host((ETH0, ETH2), {6: "eth2"}), (), "2001:db8::2"),
    "IPv4's device without an address": (AUTO, Host((ETH2,), {4: "eth1", 6: "eth2"}), (), "2001:db8::2"),
    "the current one though another is preferred": ("eth0", HOST, ("192.0.2.9",), "192.0.2.9"),
    "another when the current one is gone": ("eth0", HOST, ("192.0.2.8",), "192.0.2.1"),
    "IPv4 though the current one is IPv6": ("eth0", HOST, ("2001:db8::1",), "192.0.2.1"),
    "no pod's own": ("mixed", Host((device("mixed", "10.42.9.9", "192.0.2.7"),)), (), "192.0.2.7"),
}


@pytest.mark.parametrize(("choice", "host", "current", "endpoint"), CHOSEN.values(), ids=CHOSEN)
def test_what_a_device_stands_for(choice: str, host: Host, current: tuple[str, ...], endpoint: str) -> None:
    found = endpoints_of(choice, host, CLUSTER, tuple(map(ip_address, current)))
    assert found == (ip_address(endpoint),)


@pytest.mark.parametrize(
    ("choice", "says"),
    [("eth9", "eth9 has no address: correct node.device"), ("loom0", "loom0 has no address")],
)
def test_a_device_without_an_address(choice: str, says: str) -> None:
    with pytest.raises(UnderlayError, match=says):
        endpoints_of(choice, HOST, CLUSTER)


def test_no_default_route() -> None:
    with pytest.raises(UnderlayError, match="no default route"):
        endpoints_of(AUTO, Host((ETH0,)), CLUSTER)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def test_what_devices_carry() -> None:
    assert device_mtus(addresses("198.51.100.1", "2001:db8::1"), HOST) == {4: 9000, 6: 1500}


def test_an_address_that_is_gone_keeps_its_mtu() -> None:
    assert device_mtus(addresses("192.0.2.99"), HOST, {4: 1400}) == {4: 1400}


@pytest.mark.parametrize(
    ("endpoint", "before", "says"),
    [
        ("192.0.2.99", None, "no device of this host has the address 192.0.2.99"),
        ("192.0.2.99", {6: 1500}, "no device of this host has the address 192.0.2.99"),
        ("203.0.113.1", None, "set tunnel.underlay_mtu_bytes"),
    ],
)
def test_what_a_device_carries_is_not_known(endpoint: str, before: dict[int, int] | None, says: str) -> None:
    with pytest.raises(UnderlayError, match=says):
        device_mtus(addresses(endpoint), HOST, before)
