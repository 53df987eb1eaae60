"""What the daemon makes in the kernel, seen by iproute2."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from forwarder.addresses import derive_mac, format_mac
from tests.netns.nodes import Node
from tests.netns_tools import Namespace, run

pytestmark = pytest.mark.root

ROUTER_MAC = format_mac(derive_mac("n1", "router"))
GATEWAY_MAC = format_mac(derive_mac("n1", "gateway"))
CLUSTER_ROUTE = "10.42.0.0/16 via 169.254.71.1 dev loom0 proto 71 src 10.42.1.1 onlink"
CLUSTER_ROUTE6 = (
    "fd42::/48 via fe80::706f:646c dev loom0 proto 71 src fd42:0:0:1::1 metric 1024 onlink pref medium"
)


def link(namespace: Namespace, name: str) -> dict[str, Any]:
    (found,) = namespace.ip_json("link", "show", "dev", name)
    return dict(found)


def global_addresses(namespace: Namespace) -> set[str]:
    (shown,) = namespace.ip_json("addr", "show", "dev", "loom0", "scope", "global")
    listed = shown.get("addr_info", [])
    # Addresses of another scope are listed as empty objects.
    return {f"{address['local']}/{address['prefixlen']}" for address in listed if address}


def routes(namespace: Namespace) -> list[str]:
    """Those that carry our mark, of the main table."""
    lines = namespace.ip("route") + namespace.ip("-6", "route")
    return [line.strip() for line in lines.splitlines() if "proto 71" in line]


def neighbours(namespace: Namespace) -> set[str]:
    return {
        line.strip()
        for line in namespace.ip("neigh", "show", "nud", "permanent", "dev", "loom0").splitlines()
    }


def router_entry(namespace: Namespace) -> dict[str, Any]:
    (found,) = [entry for entry in namespace.bridge_json("fdb", "show") if entry["mac"] == ROUTER_MAC]
    return dict(found)


def snapshot(namespace: Namespace) -> dict[str, Any]:
    """What of the kernel is ours, without what counts or is random."""
    bridge, tap = link(namespace, "loom0"), link(namespace, "loom-tap")
    return {
        "loom0": (
            bridge["linkinfo"]["info_kind"],
            bridge["ifalias"],
            bridge["address"],
            bridge["mtu"],
            "UP" in bridge["flags"],
            *(
                bridge["linkinfo"]["info_data"][key]
                for key in ("stp_state", "mcast_snooping", "forward_delay")
            ),
        ),
        "loom-tap": (tap["ifalias"], tap["mtu"], tap["txqlen"], tap["master"], "UP" in tap["flags"]),
        "tun": {key: tap["linkinfo"]["info_data"][key] for key in ("type", "pi", "vnet_hdr", "persist")},
        "port": {
            key: tap["linkinfo"]["info_slave_data"][key]
            for key in ("isolated", "learning", "flood", "mcast_flood", "bcast_flood")
        },
        "fdb": {key: router_entry(namespace).get(key) for key in ("ifname", "master", "state", "flags")},
        "addresses": global_addresses(namespace),
        "routes": routes(namespace),
        "neighbours": neighbours(namespace),
    }


@pytest.fixture
def settled(node: Node) -> Node:
    node.start()
    return node


def test_links_are_as_the_contract_says(settled: Node) -> None:
    namespace = settled.namespace
    seen = snapshot(namespace)
    assert seen["loom0"] == ("bridge", "podloom:n1", GATEWAY_MAC, 1450, True, 0, 0, 0)
    assert seen["loom-tap"] == ("podloom:n1", 1450, 2000, "loom0", True)
    assert seen["tun"] == {"type": "tap", "pi": False, "vnet_hdr": True, "persist": False}
    assert set(seen["port"].items()) == {
        ("isolated", True),
        ("learning", False),
        ("flood", False),
        ("mcast_flood", False),
        ("bcast_flood", False),
    }
    assert (seen["fdb"]["ifname"], seen["fdb"]["master"], seen["fdb"]["state"]) == (
        "loom-tap",
        "loom0",
        "static",
    )
    assert seen["addresses"] == {"10.42.1.1/24", "fd42:0:0:1::1/64"}
    assert seen["routes"] == [CLUSTER_ROUTE, CLUSTER_ROUTE6]
    assert seen["neighbours"] == {
        f"169.254.71.1 lladdr {ROUTER_MAC} PERMANENT",
        f"fe80::706f:646c lladdr {ROUTER_MAC} PERMANENT",
    }
    for name, value in {
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "1",
        "net/ipv6/conf/loom0/accept_ra": "0",
        "net/ipv4/conf/all/send_redirects": "0",
        "net/ipv4/conf/loom0/send_redirects": "0",
        "net/ipv4/conf/loom0/rp_filter": "2",
        "net/ipv6/conf/loom-tap/disable_ipv6": "1",
    }.items():
        assert namespace.sysctl(name) == value, name


def test_no_address_is_tentative_when_the_daemon_is_ready(settled: Node) -> None:
    assert "tentative" not in settled.namespace.ip("-6", "addr", "show", "dev", "loom0")


def test_a_pod_cannot_draw_the_routers_entry_to_its_port(settled: Node) -> None:
    """A frame whose source is the router's MAC arrives at another port; the entry must stay at the TAP."""
    namespace = settled.namespace
    namespace.ip("link", "add", "pod", "type", "veth", "peer", "name", "thief")
    namespace.ip("link", "set", "pod", "master", "loom0", "up")
    namespace.ip("link", "set", "thief", "address", ROUTER_MAC)
    namespace.ip("link", "set", "thief", "up")
    namespace.ip("addr", "add", "198.51.100.1/24", "dev", "thief")
    namespace.ip(
        "neigh", "add", "198.51.100.2", "lladdr", "ff:ff:ff:ff:ff:ff", "dev", "thief", "nud", "permanent"
    )
    program = "import socket; socket.socket(2, 2).sendto(b'x', ('198.51.100.2', 9))"
    before = received(namespace, "pod")
    run_python(namespace, program)
    assert received(namespace, "pod") > before, "the thief's frame did not arrive"
    assert router_entry(namespace)["ifname"] == "loom-tap"


def received(namespace: Namespace, name: str) -> int:
    (found,) = namespace.ip_json("-s", "link", "show", "dev", name)
    return int(found["stats64"]["rx"]["packets"])


def run_python(namespace: Namespace, program: str) -> None:
    run(namespace.command([sys.executable, "-c", program]))


DRIFT: dict[str, Callable[[Namespace], object]] = {
    "address removed": lambda ns: ns.ip("addr", "del", "10.42.1.1/24", "dev", "loom0"),
    "IPv6 address removed": lambda ns: ns.ip("addr", "del", "fd42:0:0:1::1/64", "dev", "loom0"),
    "address of others": lambda ns: ns.ip("addr", "add", "10.9.9.9/24", "dev", "loom0"),
    "link down": lambda ns: ns.ip("link", "set", "loom0", "down"),
    "MTU": lambda ns: ns.ip("link", "set", "loom0", "mtu", "1000"),
    "MAC": lambda ns: ns.ip("link", "set", "loom0", "address", "02:00:00:00:00:99"),
    "alias": lambda ns: ns.ip("link", "set", "loom0", "alias", "podloom:someone"),
    "STP on": lambda ns: ns.ip("link", "set", "loom0", "type", "bridge", "stp_state", "1"),
    "route removed": lambda ns: ns.ip("route", "del", "10.42.0.0/16"),
    "route of a former cluster": lambda ns: (
        ns.ip("route", "add", "10.50.0.0/16", "dev", "loom0", "proto", "71")
    ),
    "route without source": lambda ns: (
        ns.ip("route", "del", "10.42.0.0/16"),
        ns.ip("route", "add", "10.42.0.0/16", "dev", "loom0", "proto", "71"),
    ),
    "neighbour removed": lambda ns: ns.ip("neigh", "del", "169.254.71.1", "dev", "loom0"),
    "neighbour changed": lambda ns: ns.ip(
        *("neigh", "replace", "fe80::706f:646c", "dev", "loom0"),
        *("lladdr", "02:00:00:00:00:99", "nud", "permanent"),
    ),
    "forwarding off": lambda ns: ns.set_sysctl("net/ipv4/ip_forward", "0"),
    "everything": lambda ns: ns.ip("link", "del", "loom0"),
    "nothing": lambda _: None,
}  # fmt: skip


def test_a_restart_after_kill_repairs_whatever_was_spoilt(settled: Node) -> None:
    before = snapshot(settled.namespace)
    for name, spoil in DRIFT.items():
        assert settled.stop(signal.SIGKILL) == -signal.SIGKILL
        assert "loom-tap" not in settled.namespace.link_names()
        spoil(settled.namespace)
        settled.start()
        assert snapshot(settled.namespace) == before, name
        assert settled.namespace.sysctl("net/ipv4/ip_forward") == "1", name


def test_a_restart_that_finds_all_well_changes_only_the_tap(settled: Node) -> None:
    index = link(settled.namespace, "loom0")["ifindex"]
    settled.stop()
    settled.start()
    assert link(settled.namespace, "loom0")["ifindex"] == index


def test_what_others_made_is_named_and_left_alone(node: Node) -> None:
    node.namespace.ip("link", "add", "loom0", "type", "veth", "peer", "name", "theirs")
    links = node.namespace.link_names()
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "link loom0 is somebody's veth link: remove it or choose another name in [links]" in done.stderr
    assert node.namespace.link_names() == links


def test_a_foreign_route_is_named_and_left_alone(node: Node) -> None:
    node.namespace.ip("route", "add", "10.42.0.0/16", "dev", "eth0")
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "route 10.42.0.0/16 dev eth0 was not made by podloom (protocol 3)" in done.stderr
    assert "10.42.0.0/16 dev eth0" in node.namespace.ip("route")


@pytest.mark.parametrize(
    ("endpoints", "mtu"),
    [(["192.0.2.1"], 1450), (["2001:db8::1"], 1430), (["192.0.2.1", "2001:db8::1"], 1430)],
    ids=["IPv4", "IPv6", "both"],
)
def test_mtu_is_the_underlays_less_the_encapsulation(node: Node, endpoints: list[str], mtu: int) -> None:
    node.tables["node"]["endpoints"] = endpoints
    node.start()
    assert (link(node.namespace, "loom0")["mtu"], link(node.namespace, "loom-tap")["mtu"]) == (mtu, mtu)
    assert node.ask("status")["mtu"] == mtu


def test_mtu_may_be_given(node: Node) -> None:
    node.tables["tunnel"] = {"underlay_mtu_bytes": 1400}
    node.start()
    assert link(node.namespace, "loom-tap")["mtu"] == 1350


@pytest.mark.parametrize("switch", ["all", "absent from the configuration"])
def test_a_host_without_ipv6_serves_ipv4(node: Node, switch: str) -> None:
    if switch == "all":
        node.namespace.set_sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    else:
        node.tables["node"]["prefixes"] = ["10.42.1.0/24"]
    node.start()
    assert global_addresses(node.namespace) == {"10.42.1.1/24"}
    assert routes(node.namespace) == [CLUSTER_ROUTE]
    assert node.ask("status")["prefixes"] == ["10.42.1.0/24"]
    assert ("this host has no IPv6: its pods get IPv4 only" in node.log) is (switch == "all")


def test_clean_removal_leaves_nothing(node: Node) -> None:
    def traces() -> list[str]:
        shown = [
            node.namespace.ip(*words)
            for words in (
                ["-o", "link"],
                ["route", "show", "table", "all"],
                ["-6", "route", "show", "table", "all"],
                ["neigh"],
            )
        ]
        return [
            line for lines in shown for line in lines.splitlines() if "loom" in line or "proto 71" in line
        ]

    links = node.namespace.link_names()
    node.tables["links"] = {"keep_on_exit": False}
    node.start()
    assert traces()
    assert node.stop() == 0
    assert traces() == []
    assert node.namespace.link_names() == links
    assert [path.name for path in (node.directory / "run").iterdir()] == ["lock"]


def test_links_stay_for_the_pods_by_default(settled: Node) -> None:
    assert settled.stop() == 0
    assert "loom0" in settled.namespace.link_names()
    assert CLUSTER_ROUTE.split(" proto")[0] in settled.namespace.ip("route")
