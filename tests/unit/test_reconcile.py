from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.reconcile import (
    ROUTE_PROTOCOL,
    AddAddress,
    CreateBridge,
    ForeignError,
    KernelState,
    Link,
    Operation,
    PutFdb,
    PutNeighbour,
    PutRoute,
    RemoveAddress,
    RemoveRoute,
    Route,
    SetLink,
    SetUp,
    Wiring,
    WriteSysctl,
    reconcile,
    wanted,
)

WIRING = Wiring(
    node_id="a",
    bridge="loom0",
    tap="loom-tap",
    tap_queue_frames=2000,
    mtu_bytes=1450,
    router_mac=bytes.fromhex("02000000000a"),
    gateway_mac=bytes.fromhex("0200000000aa"),
    prefixes=(ip_network("10.42.1.0/24"), ip_network("fd42:0:0:1::/64")),
    cluster_cidrs=(ip_network("10.42.0.0/16"), ip_network("fd42::/48")),
    ipv6_available=True,
    bridge_netfilter=True,
)
WANTED = wanted(WIRING)
FRESH_TAP = Link(kind="tun", alias="podloom:a", mac="16:33:3b:0e:f0:f9", mtu_bytes=1500, up=False)
FRESH = KernelState(links={"loom-tap": FRESH_TAP})
"""A host on which only the TAP has been opened."""


def perform(state: KernelState, operations: Iterable[Operation]) -> KernelState:
    """What a kernel holds after the operations; it refuses what a kernel refuses."""
    links, sysctls, routes = dict(state.links), dict(state.sysctls), set(state.routes)
    addresses = {name: set(held) for name, held in state.addresses.items()}
    neighbours = {name: dict(held) for name, held in state.neighbours.items()}
    fdb = {name: set(held) for name, held in state.fdb.items()}
    for operation in operations:
        match operation:
            case CreateBridge(name, link):
                assert name not in links
                links[name] = replace(link, alias="", up=False)
            case SetLink(name, link, _):
                assert link.master is None or link.master in links
                links[name] = replace(link, mac=link.mac or links[name].mac, up=links[name].up)
            case SetUp(name):
                links[name] = replace(links[name], up=True)
            case WriteSysctl(path, value):
                parts = path.split("/")
                assert parts[2] != "conf" or parts[3] in ("all", *links), f"no link for {path}"
                sysctls[path] = value
            case RemoveAddress(name, address):
                addresses[name].remove(address)
                routes = {route for route in routes if route.source != address.ip}
            case AddAddress(name, address):
                assert links[name].up
                addresses.setdefault(name, set()).add(address)
            case PutNeighbour(name, address, mac):
                assert links[name].up
                neighbours.setdefault(name, {})[address] = mac
            case PutFdb(name, mac):
                assert links[name].master is not None
                fdb.setdefault(name, set()).add(mac)
            case RemoveRoute(route):
                routes.discard(route)
            case PutRoute(route):
                assert route.link in links
                assert any(route.source == address.ip for address in addresses[str(route.link)])
                routes = {other for other in routes if other.destination != route.destination} | {route}
    return KernelState(
        links,
        {name: frozenset(held) for name, held in addresses.items()},
        neighbours,
        {name: frozenset(held) for name, held in fdb.items()},
        frozenset(routes),
        sysctls,
    )


SETTLED = perform(FRESH, reconcile(WANTED, FRESH))


def test_a_fresh_host_is_brought_to_the_wanted_state() -> None:
    assert reconcile(WANTED, SETTLED) == ()


def test_what_is_wanted_of_the_kernel() -> None:
    assert WANTED.links["loom0"].mac == "02:00:00:00:00:aa"
    assert {link.alias for link in WANTED.links.values()} == {"podloom:a"}
    assert WANTED.addresses == {"loom0": {ip_interface("10.42.1.1/24"), ip_interface("fd42:0:0:1::1/64")}}
    assert WANTED.neighbours == {
        "loom0": {
            ip_address("169.254.71.1"): "02:00:00:00:00:0a",
            ip_address("fe80::706f:646c"): "02:00:00:00:00:0a",
        }
    }
    assert WANTED.fdb == {"loom-tap": {"02:00:00:00:00:0a"}}
    assert WANTED.routes == {
        Route(
            destination=ip_network("10.42.0.0/16"),
            link="loom0",
            gateway=ip_address("169.254.71.1"),
            source=ip_address("10.42.1.1"),
            onlink=True,
            protocol=ROUTE_PROTOCOL,
        ),
        Route(
            destination=ip_network("fd42::/48"),
            link="loom0",
            gateway=ip_address("fe80::706f:646c"),
            source=ip_address("fd42:0:0:1::1"),
            onlink=True,
            protocol=ROUTE_PROTOCOL,
        ),
    }


def test_a_host_without_ipv6_is_asked_for_ipv4_only() -> None:
    state = wanted(replace(WIRING, ipv6_available=False))
    assert state.addresses == {"loom0": {ip_interface("10.42.1.1/24")}}
    assert {route.destination.version for route in state.routes} == {4}
    assert not [path for path in state.sysctls if "ipv6" in path or "ip6" in path]


def test_br_netfilter_is_kept_off_where_it_is_loaded() -> None:
    assert {path: value for path, value in WANTED.sysctls.items() if "bridge" in path} == {
        "net/bridge/bridge-nf-call-iptables": "0",
        "net/bridge/bridge-nf-call-ip6tables": "0",
    }
    state = wanted(replace(WIRING, ipv6_available=False))
    assert [path for path in state.sysctls if "bridge" in path] == ["net/bridge/bridge-nf-call-iptables"]
    state = wanted(replace(WIRING, bridge_netfilter=False))
    assert not [path for path in state.sysctls if "bridge" in path]


def test_a_cluster_of_one_node_needs_no_cluster_route() -> None:
    state = wanted(replace(WIRING, prefixes=WIRING.cluster_cidrs))
    assert state.routes == frozenset()


def test_a_cidr_without_a_prefix_of_its_own_is_reached_from_another() -> None:
    """Pods of other nodes may live in a second network of the cluster."""
    cidrs = (*WIRING.cluster_cidrs, ip_network("10.99.0.0/16"))
    routes = {str(route.destination): route for route in wanted(replace(WIRING, cluster_cidrs=cidrs)).routes}
    assert str(routes["10.99.0.0/16"].source) == "10.42.1.1"


LOOM0 = SETTLED.links["loom0"]
TAP = SETTLED.links["loom-tap"]
ROUTE = min(SETTLED.routes, key=lambda route: route.destination.version)
STRAY = ip_interface("10.9.9.9/24")


@pytest.mark.parametrize(
    ("installed", "operations"),
    [
        (
            replace(SETTLED, links={**SETTLED.links, "loom0": replace(LOOM0, mtu_bytes=1500)}),
            [SetLink("loom0", WANTED.links["loom0"], replace(LOOM0, mtu_bytes=1500))],
        ),
        (
            replace(SETTLED, links={**SETTLED.links, "loom0": replace(LOOM0, up=False)}),
            [SetUp("loom0")],
        ),
        (
            replace(SETTLED, links={**SETTLED.links, "loom-tap": replace(TAP, master=None)}),
            [SetLink("loom-tap", WANTED.links["loom-tap"], replace(TAP, master=None))],
        ),
        (
            replace(
                SETTLED, links={**SETTLED.links, "loom-tap": replace(TAP, port={**TAP.port, "isolated": 0})}
            ),
            [SetLink("loom-tap", WANTED.links["loom-tap"], replace(TAP, port={**TAP.port, "isolated": 0}))],
        ),
        (
            replace(SETTLED, addresses={"loom0": SETTLED.addresses["loom0"] | {STRAY}}),
            [RemoveAddress("loom0", STRAY)],
        ),
        (
            replace(SETTLED, addresses={"loom0": frozenset()}),
            [
                AddAddress("loom0", ip_interface("10.42.1.1/24")),
                AddAddress("loom0", ip_interface("fd42:0:0:1::1/64")),
            ],
        ),
        (
            replace(SETTLED, neighbours={"loom0": {ip_address("169.254.71.1"): "02:00:00:00:00:0b"}}),
            [
                PutNeighbour("loom0", ip_address("169.254.71.1"), "02:00:00:00:00:0a"),
                PutNeighbour("loom0", ip_address("fe80::706f:646c"), "02:00:00:00:00:0a"),
            ],
        ),
        (replace(SETTLED, fdb={}), [PutFdb("loom-tap", "02:00:00:00:00:0a")]),
        (replace(SETTLED, routes=SETTLED.routes - {ROUTE}), [PutRoute(ROUTE)]),
        (
            replace(SETTLED, routes=SETTLED.routes - {ROUTE} | {replace(ROUTE, onlink=False)}),
            [PutRoute(ROUTE)],
        ),
        (
            replace(
                SETTLED, routes=SETTLED.routes | {replace(ROUTE, destination=ip_network("10.50.0.0/16"))}
            ),
            [RemoveRoute(replace(ROUTE, destination=ip_network("10.50.0.0/16")))],
        ),
        (
            replace(SETTLED, sysctls={**SETTLED.sysctls, "net/ipv4/ip_forward": "0"}),
            [WriteSysctl("net/ipv4/ip_forward", "1")],
        ),
    ],
    ids=[
        "MTU",
        "link down",
        "TAP off the bridge",
        "port not isolated",
        "stray address",
        "addresses gone",
        "neighbours wrong",
        "FDB entry gone",
        "route gone",
        "route not onlink",
        "route of a former cluster CIDR",
        "sysctl",
    ],
)
def test_drift_is_repaired_by_just_what_it_takes(installed: KernelState, operations: list[Operation]) -> None:
    assert list(reconcile(WANTED, installed)) == operations
    assert reconcile(WANTED, perform(installed, operations)) == ()


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ({"loom0": Link(kind="dummy", alias="")}, "link loom0 is somebody's dummy link"),
        ({"loom0": Link(kind="bridge", alias="")}, "link loom0 was not made by podloom"),
        ({"loom0": Link(kind="bridge", alias="docker")}, "link loom0 was not made by podloom"),
        ({"loom-tap": Link(kind="tun", alias="")}, "link loom-tap was not made by podloom"),
    ],
)
def test_what_is_not_ours_is_not_touched(installed: dict[str, Link], says: str) -> None:
    with pytest.raises(ForeignError, match=says):
        reconcile(WANTED, KernelState(links=installed))


def test_a_foreign_route_in_the_way_is_named() -> None:
    static = replace(ROUTE, protocol=4, link="eth1")
    with pytest.raises(ForeignError, match=r"route 10.42.0.0/16 dev eth1 .*\(protocol 4\)"):
        reconcile(WANTED, replace(SETTLED, routes=frozenset({static})))


def test_foreign_routes_elsewhere_stay() -> None:
    others = {
        replace(ROUTE, destination=ip_network("10.50.0.0/16"), protocol=4),
        replace(ROUTE, destination=ip_network("10.51.0.0/16"), link="another-loom"),
    }
    assert reconcile(WANTED, replace(SETTLED, routes=SETTLED.routes | others)) == ()


def test_a_bridge_from_before_its_alias_was_set_is_ours_by_its_mac() -> None:
    halfway = Link(kind="bridge", alias="", mac="02:00:00:00:00:aa", up=False)
    state = KernelState(links={"loom0": halfway, "loom-tap": FRESH_TAP})
    assert reconcile(WANTED, perform(state, reconcile(WANTED, state))) == ()


@given(st.integers(0, len(reconcile(WANTED, FRESH))), st.integers(0, len(reconcile(WANTED, FRESH))))
def test_a_daemon_killed_between_any_two_operations_is_repaired(done: int, done_again: int) -> None:
    state = perform(FRESH, reconcile(WANTED, FRESH)[:done])
    state = perform(state, reconcile(WANTED, state)[:done_again])
    assert reconcile(WANTED, perform(state, reconcile(WANTED, state))) == ()


def test_a_node_given_other_prefixes_sheds_the_old() -> None:
    changed = wanted(replace(WIRING, prefixes=(ip_network("10.42.7.0/24"),)))
    state = SETTLED
    for _ in range(2):  # An address takes its routes along, which the second look finds.
        state = perform(state, reconcile(changed, state))
    assert reconcile(changed, state) == ()
    assert state.addresses["loom0"] == {ip_interface("10.42.7.1/24")}
    assert {str(route.destination) for route in state.routes} == {"10.42.0.0/16"}
