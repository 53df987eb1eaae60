"""Our rtnetlink messages as pyroute2 reads them, its messages as we read them, and any bytes at all."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from cni import rtnetlink
from cni.rtnetlink import Link, Route, VethEnd

HEADER_BYTES = 16  # struct nlmsghdr

HOST = VethEnd("pl0", "fe:00:00:00:00:01", 1450, 44)
POD = VethEnd("eth0", "02:00:00:00:00:02", 1450)


def decoded(kind: type, body: bytes) -> Any:
    size = HEADER_BYTES + len(body)
    message = kind(size.to_bytes(4, "little") + bytes(HEADER_BYTES - 4) + body)
    message.decode()
    return message


def encoded(kind: type, attributes: list[tuple[str, Any]], **fields: Any) -> bytes:
    message = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)[HEADER_BYTES:]


def test_a_veth_has_all_that_it_is_born_with() -> None:
    message = decoded(ifinfmsg, rtnetlink.veth(HOST, POD, 17, 5))
    info = message.get_attr("IFLA_LINKINFO")
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    names = ("IFLA_IFNAME", "IFLA_ADDRESS", "IFLA_MTU", "IFLA_GSO_MAX_SEGS", "IFLA_MASTER", "IFLA_NET_NS_FD")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    assert [message.get_attr(name) for name in names] == ["pl0", HOST.mac, 1450, 44, 5, None]
    assert [peer.get_attr(name) for name in names] == ["eth0", POD.mac, 1450, None, None, 17]


def test_a_port_is_isolated_marked_and_up() -> None:
    message = decoded(ifinfmsg, rtnetlink.isolated_port_up("pl0", "podloom a/b/eth0"))
    info = message.get_attr("IFLA_LINKINFO")
    port = info.get_attr("IFLA_INFO_SLAVE_DATA")
    assert (message["flags"], message["change"], message.get_attr("IFLA_IFNAME")) == (1, 1, "pl0")
    assert message.get_attr("IFLA_IFALIAS") == "podloom a/b/eth0"
    assert info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
    assert (port.get_attr("IFLA_BRPORT_ISOLATED"), port.get_attr("IFLA_BRPORT_MODE")) == (1, 0)


def test_a_link_gets_another_size_and_keeps_what_is_not_said() -> None:
    message = decoded(ifinfmsg, rtnetlink.changed_link("pl0", mtu=1350, gso_max_segs=47))
    assert (message["flags"], message["change"], message.get_attr("IFLA_IFNAME")) == (0, 0, "pl0")
    assert (message.get_attr("IFLA_MTU"), message.get_attr("IFLA_GSO_MAX_SEGS")) == (1350, 47)
    assert message.get_attr("IFLA_MASTER") is None
    moved = decoded(ifinfmsg, rtnetlink.changed_link("pl0", master=7))
    assert (moved.get_attr("IFLA_MASTER"), moved.get_attr("IFLA_MTU")) == (7, None)


@pytest.mark.parametrize(("text", "length", "flags"), [("10.71.0.2", 32, 0), ("fd71::2", 128, 0x02)])
def test_an_address_stands_alone(text: str, length: int, flags: int) -> None:
    message = decoded(ifaddrmsg, rtnetlink.address(9, ip_address(text)))
    assert (message["index"], message["prefixlen"], message["flags"]) == (9, length, flags)
    assert {message.get_attr("IFA_LOCAL"), message.get_attr("IFA_ADDRESS")} == {text}


@pytest.mark.parametrize("gateway", ["10.71.0.1", "fd71::1", ""])
@pytest.mark.parametrize("length", [0, 24])
def test_a_route_there_and_back(gateway: str, length: int) -> None:
    dst = ip_address("fd72::" if ":" in gateway else "10.72.0.0")
    anywhere = ip_address("::" if ":" in gateway else "0.0.0.0")
    route = Route(dst if length else anywhere, length, ip_address(gateway) if gateway else None)
    body = rtnetlink.route(9, route, 2057)
    message = decoded(rtmsg, body)
    assert message.get_attr("RTA_GATEWAY") == (gateway or None)
    assert message.get_attr("RTA_DST") == (str(dst) if length else None)
    assert (message["dst_len"], message["table"], message["proto"], message["type"]) == (length, 254, 4, 1)
    assert (message["scope"], message.get_attr("RTA_OIF"), message.get_attr("RTA_PRIORITY")) == (
        0 if gateway else 253,
        9,
        2057,
    )
    assert rtnetlink.read_route(body) == (9, route)


def test_what_is_no_route_of_ours() -> None:
    assert rtnetlink.read_route(encoded(rtmsg, [], family=2, type=3)) is None, "broadcast"
    assert rtnetlink.read_route(encoded(rtmsg, [], family=128, type=1)) is None, "multicast's own family"


def test_a_filter_is_found_by_its_name() -> None:
    body = rtnetlink.ingress_filter(9, 17, "podloom_guard")
    options = decoded(tcmsg, body).get_attr("TCA_OPTIONS")
    assert (options.get_attr("TCA_BPF_FD"), options.get_attr("TCA_BPF_NAME")) == (17, "podloom_guard")
    assert rtnetlink.read_filter_name(body) == "podloom_guard"
    assert rtnetlink.read_filter_name(rtnetlink.clsact(9)) == ""


def test_a_link_is_read_whole() -> None:
    port = {"attrs": [("IFLA_BRPORT_STATE", 3), ("IFLA_BRPORT_ISOLATED", 1)]}
    info = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", port)]
    attributes = [
        ("IFLA_IFNAME", "pl0"),
        ("IFLA_ADDRESS", "fe:00:00:00:00:01"),
        ("IFLA_MTU", 1450),
        ("IFLA_IFALIAS", "podloom a/b/eth0"),
        ("IFLA_MASTER", 5),
        ("IFLA_LINK", 2),
        ("IFLA_LINKINFO", {"attrs": info}),
    ]
    assert rtnetlink.read_link(encoded(ifinfmsg, attributes, index=9, flags=0x1003)) == Link(
        9, "pl0", "veth", "fe:00:00:00:00:01", 1450, True, "podloom a/b/eth0", 5, 2, True, True
    )
    assert rtnetlink.read_link(encoded(ifinfmsg, [], index=1)) == Link(
        1, "", "", "", 0, False, "", None, None, False, False
    )


@given(st.binary(min_size=20, max_size=80))
def test_any_attributes_are_read(data: bytes) -> None:
    """A reader takes what is cut short or nonsense as absent; only an address must be there and fit."""
    rtnetlink.read_link(data)
    rtnetlink.read_filter_name(data)
    for read in (rtnetlink.read_address, rtnetlink.read_route):
        try:
            read(data)
        except (KeyError, ValueError):
            continue
