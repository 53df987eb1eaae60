"""Which routes of ours the kernel holds, of all that ask for some. Pure.

The cluster's own lead into the tunnel. Beside them a prefix gets its own where its path carries less than
the pods' MTU (`paths`), or where its node is on our segment (`legs`): one by that node, and as long as
traffic is not to go there one before it into the tunnel. So what watches the direct path goes by its
route, for it is bound to the link, and all else by the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Final

from forwarder.addresses import Network
from forwarder.legs import Hop
from forwarder.peers import is_inside
from forwarder.reconcile import PutRoute, RemoveRoute, Route

MAX_PATH_ROUTES: Final = 256
"""Prefixes with a route of their own for their MTU. With more, as when our own device's MTU was lowered, the
cluster's routes carry the least MTU of all instead."""

TUNNEL_METRIC: Final = 7100
DIRECT_METRIC: Final = 7101
LAST_METRIC: Final = 7102
"""Of prefixes' routes. Of two the lesser wins; so do a routing daemon's (BIRD's have 32), and what somebody
sets by hand."""


def routes(
    cluster: Set[Route], mtus: Mapping[Network, int], hops: Mapping[Network, Hop], by_bgp: Set[Network]
) -> frozenset[Route]:
    """`mtus` are of prefixes whose path carries less than the pods' MTU, `hops` of those whose node is on
    our segment; `by_bgp` are prefixes that a routing daemon has a route for, which ours must not hide."""
    short = {prefix: mtu_bytes for prefix, mtu_bytes in mtus.items() if prefix not in by_bgp}
    if len(short) > MAX_PATH_ROUTES:
        cluster, short = {replace(route, mtu_bytes=_least(route, short)) for route in cluster}, {}
    wanted: set[Route] = set()
    for route in cluster:
        direct = {
            prefix: hop
            for prefix, hop in hops.items()
            if prefix not in by_bgp and is_inside(prefix, route.destination)
        }
        wanted.update(_direct(route, direct))
        tunnel = {prefix for prefix, hop in direct.items() if not hop.used}
        tunnel |= {
            prefix for prefix in short if prefix not in direct and is_inside(prefix, route.destination)
        }
        wanted.update(_into_the_tunnel(route, prefix, short) for prefix in tunnel)
        # A cluster's network may be one node's prefix: its route must not come before the prefix's own.
        if route.destination in by_bgp or (route.destination in direct and direct[route.destination].used):
            wanted.add(replace(route, metric=LAST_METRIC))
        elif route.destination not in tunnel:
            wanted.add(route)
    return frozenset(wanted)


def _direct(route: Route, hops: Mapping[Network, Hop]) -> Iterator[Route]:
    for prefix, hop in hops.items():
        yield Route(
            destination=prefix,
            link=hop.next_hop.link,
            gateway=hop.next_hop.address,
            source=route.source,
            onlink=False,
            protocol=route.protocol,
            metric=DIRECT_METRIC,
        )


def _into_the_tunnel(route: Route, prefix: Network, mtus: Mapping[Network, int]) -> Route:
    metric = route.metric if prefix == route.destination else TUNNEL_METRIC
    mtu_bytes = mtus.get(prefix, route.mtu_bytes)
    return replace(route, destination=prefix, mtu_bytes=mtu_bytes, metric=metric)


def _least(route: Route, mtus: Mapping[Network, int]) -> int | None:
    return min((mtu for prefix, mtu in mtus.items() if is_inside(prefix, route.destination)), default=None)


def changes(installed: Set[Route], wanted: Set[Route]) -> tuple[PutRoute | RemoveRoute, ...]:
    """What leads from one set of routes to the other. What is put comes first, the tunnel's before the
    direct ones, and goes last, so that no packet finds a greater MTU than before and after, or a direct path
    that is not trusted."""
    kept = {route.key for route in wanted}
    return (
        *(PutRoute(route) for route in sorted(wanted - installed, key=_by_metric)),
        *(
            RemoveRoute(route)
            for route in sorted(installed, key=_by_metric, reverse=True)
            if route.key not in kept
        ),
    )


def _by_metric(route: Route) -> tuple[int, int, str]:
    return route.metric or 0, route.destination.version, str(route.destination)
