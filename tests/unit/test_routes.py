from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network

from forwarder.addresses import VIRTUAL_ROUTER, Network
from forwarder.legs import Hop, NextHop
from forwarder.reconcile import ROUTE_PROTOCOL, PutRoute, RemoveRoute, Route
from forwarder.routes import (
    DIRECT_METRIC,
    LAST_METRIC,
    MAX_PATH_ROUTES,
    TUNNEL_METRIC,
    changes,
    routes,
)


def cluster_route(cidr: str, source: str) -> Route:
    destination = ip_network(cidr)
    return Route(
        destination=destination,
        link="loom0",
        gateway=VIRTUAL_ROUTER[destination.version],
        source=ip_address(source),
        onlink=True,
        protocol=ROUTE_PROTOCOL,
    )


CLUSTER4 = cluster_route("10.42.0.0/16", "10.42.1.1")
CLUSTER6 = cluster_route("fd42::/48", "fd42:0:0:1::1")
CLUSTER = frozenset({CLUSTER4, CLUSTER6})
NONE = frozenset[Network]()


def networks(mtus: Mapping[str, int]) -> dict[Network, int]:
    return {ip_network(prefix): mtu_bytes for prefix, mtu_bytes in mtus.items()}


def test_routes_stand_beside_the_clusters() -> None:
    assert routes(CLUSTER, {}, {}, NONE) == CLUSTER
    assert routes(CLUSTER, networks({"10.42.2.0/24": 1350, "fd42:0:0:2::/64": 1290}), {}, NONE) == CLUSTER | {
        replace(CLUSTER4, destination=ip_network("10.42.2.0/24"), mtu_bytes=1350, metric=TUNNEL_METRIC),
        replace(CLUSTER6, destination=ip_network("fd42:0:0:2::/64"), mtu_bytes=1290, metric=TUNNEL_METRIC),
    }


def test_a_prefix_without_a_cluster_route_gets_none() -> None:
    """A host without IPv6 has no such route, and its peers may have IPv6 prefixes."""
    only4 = frozenset({CLUSTER4})
    assert routes(only4, networks({"fd42:0:0:2::/64": 1350}), {}, NONE) == only4


def test_a_prefix_that_is_a_cluster_cidr_changes_its_route() -> None:
    assert routes(CLUSTER, networks({"10.42.0.0/16": 1350}), {}, NONE) == {
        replace(CLUSTER4, mtu_bytes=1350),
        CLUSTER6,
    }


def test_very_many_short_paths_take_no_more_routes() -> None:
    many = {ip_network((0x0A2A0000 + (index << 4), 28)): 1300 + index for index in range(MAX_PATH_ROUTES)}
    assert len(routes(CLUSTER, many, {}, NONE)) == len(CLUSTER) + MAX_PATH_ROUTES
    many[ip_network("10.42.255.0/28")] = 1299
    assert routes(CLUSTER, many, {}, NONE) == {replace(CLUSTER4, mtu_bytes=1299), CLUSTER6}


def test_routes_are_put_before_others_go() -> None:
    prefix = replace(CLUSTER4, destination=ip_network("10.42.2.0/24"), mtu_bytes=1350, metric=TUNNEL_METRIC)
    lower = replace(prefix, mtu_bytes=1300)
    whole = replace(CLUSTER4, mtu_bytes=1300)
    assert changes(CLUSTER, CLUSTER) == ()
    assert changes(CLUSTER, CLUSTER | {prefix}) == (PutRoute(prefix),)
    assert changes(CLUSTER | {prefix}, CLUSTER | {lower}) == (PutRoute(lower),)
    assert changes(CLUSTER | {prefix}, CLUSTER) == (RemoveRoute(prefix),)
    assert changes(CLUSTER | {prefix}, frozenset({whole, CLUSTER6})) == (PutRoute(whole), RemoveRoute(prefix))
    assert changes(frozenset({whole, CLUSTER6}), CLUSTER) == (PutRoute(CLUSTER4),)


P2, P3 = ip_network("10.42.2.0/24"), ip_network("10.42.3.0/24")
P26 = ip_network("fd42:0:0:2::/64")
BY_ETH0 = NextHop(ip_address("192.0.2.2"), "eth0")


def direct(prefix: Network, hop: NextHop = BY_ETH0) -> Route:
    cluster = CLUSTER4 if prefix.version == 4 else CLUSTER6
    return Route(
        prefix, hop.link, hop.address, cluster.source, onlink=False, protocol=71, metric=DIRECT_METRIC
    )


def tunnel(prefix: Network, mtu_bytes: int | None = None) -> Route:
    cluster = CLUSTER4 if prefix.version == 4 else CLUSTER6
    return replace(cluster, destination=prefix, mtu_bytes=mtu_bytes, metric=TUNNEL_METRIC)


def test_a_direct_prefix_has_one_route_and_one_to_be_watched_has_two() -> None:
    hops = {P2: Hop(BY_ETH0, used=True), P3: Hop(BY_ETH0, used=False)}
    assert routes(CLUSTER, {}, hops, NONE) == CLUSTER | {direct(P2), direct(P3), tunnel(P3)}


def test_either_family_may_have_an_ipv6_next_hop() -> None:
    hop = NextHop(ip_address("2001:db8::2"), "eth0")
    wanted = routes(CLUSTER, {}, {P2: Hop(hop, used=True), P26: Hop(hop, used=True)}, NONE)
    assert wanted == CLUSTER | {direct(P2, hop), direct(P26, hop)}


def test_a_short_path_is_the_tunnels() -> None:
    mtus = networks({str(P2): 1350, str(P3): 1350})
    hops = {P2: Hop(BY_ETH0, used=True), P3: Hop(BY_ETH0, used=False)}
    assert routes(CLUSTER, mtus, hops, NONE) == CLUSTER | {direct(P2), direct(P3), tunnel(P3, 1350)}


def test_what_a_routing_daemon_leads_to_has_no_route_of_ours() -> None:
    hops = {P2: Hop(BY_ETH0, used=True), P3: Hop(BY_ETH0, used=False)}
    assert routes(CLUSTER, networks({str(P3): 1350}), hops, frozenset({P2, P3})) == CLUSTER


def test_a_prefix_outside_of_the_cluster_gets_none() -> None:
    assert routes(CLUSTER, {}, {ip_network("10.9.0.0/24"): Hop(BY_ETH0, used=True)}, NONE) == CLUSTER


def test_a_clusters_network_that_is_a_nodes_prefix_comes_last() -> None:
    """Or its route would come before the prefix's own."""
    own = replace(CLUSTER4, destination=P2)
    last = replace(own, metric=LAST_METRIC)
    assert routes({own}, {}, {}, NONE) == {own}
    assert routes({own}, {}, {P2: Hop(BY_ETH0, used=False)}, NONE) == {own, direct(P2)}
    assert routes({own}, {}, {P2: Hop(BY_ETH0, used=True)}, NONE) == {last, direct(P2)}
    assert routes({own}, {}, {}, frozenset({P2})) == {last}


def test_no_packet_goes_a_way_that_is_not_trusted() -> None:
    """The tunnel's route is put before the direct one, and goes after it."""
    watched = {direct(P2), tunnel(P2)}
    assert changes(CLUSTER, CLUSTER | watched) == (PutRoute(tunnel(P2)), PutRoute(direct(P2)))
    assert changes(CLUSTER | watched, CLUSTER) == (RemoveRoute(direct(P2)), RemoveRoute(tunnel(P2)))
    assert changes(CLUSTER | watched, CLUSTER | {direct(P2)}) == (RemoveRoute(tunnel(P2)),)
    assert changes(CLUSTER | {direct(P2)}, CLUSTER | watched) == (PutRoute(tunnel(P2)),)


def test_a_moved_next_hop_is_replaced() -> None:
    moved = direct(P2, NextHop(ip_address("192.0.2.9"), "eth0"))
    assert changes(CLUSTER | {direct(P2)}, CLUSTER | {moved}) == (PutRoute(moved),)
