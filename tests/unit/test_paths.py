from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from forwarder.addresses import Network
from forwarder.paths import (
    LOOK_PEERS,
    LOOK_SECONDS,
    MAX_NAMED,
    MIN_PAUSE_SECONDS,
    Measured,
    Prober,
    learn,
    news,
    prefix_mtus,
    slices,
)
from forwarder.peers import PeerPath, PeerRecord, SetPath, diff, tables_for

DEVICE_MTUS = {4: 1500, 6: 1500}
MTUS = {4: 1450, 6: 1430}


def record(number: int, *prefixes: str, endpoint: str = "192.0.2.{}") -> PeerRecord:
    return PeerRecord(
        id=f"n{number}",
        endpoints=(ip_address(endpoint.format(number)),),
        port=6081,
        encapsulation="geneve",
        vni=1,
        router_mac=bytes([2, 0, 0, 0, 0, number]),
        prefixes=tuple(map(ip_network, prefixes)),
    )


def path(number: int, mtu_bytes: int) -> PeerPath:
    return PeerPath(
        encapsulation="geneve",
        vni=1,
        router_mac=bytes([2, 0, 0, 0, 0, number]),
        endpoint=ip_address(f"192.0.2.{number}"),
        port=6081,
        mtu_bytes=mtu_bytes,
    )


def networks(mtus: Mapping[str, int]) -> dict[Network, int]:
    return {ip_network(prefix): mtu_bytes for prefix, mtu_bytes in mtus.items()}


@pytest.mark.parametrize(
    ("measured", "short", "changed"),
    [
        pytest.param(Measured(4, 1500), {}, {}, id="nothing new"),
        pytest.param(Measured(4, 1400), {}, {"n2": 1400}, id="shrinks"),
        pytest.param(Measured(6, 1280), {}, {"n2": 1280}, id="shrinks, IPv6"),
        pytest.param(Measured(4, 1499), {}, {"n2": 1499}, id="shrinks by one byte"),
        pytest.param(Measured(4, 1400), {"n2": 1400}, {}, id="stays short"),
        pytest.param(Measured(4, 1300), {"n2": 1400}, {"n2": 1300}, id="shrinks again"),
        pytest.param(Measured(4, 1450), {"n2": 1400}, {"n2": 1450}, id="grows, not all the way"),
        pytest.param(Measured(4, 1500), {"n2": 1400}, {"n2": None}, id="grows back"),
        pytest.param(Measured(4, 9000), {"n2": 1400}, {"n2": None}, id="grows beyond"),
        pytest.param(Measured(4, 9000), {}, {}, id="more than the pods' MTU was made for"),
        pytest.param(Measured(4, None), {}, {}, id="no route"),
        pytest.param(Measured(4, None), {"n2": 1400}, {}, id="no route: what was known stays"),
    ],
)
def test_what_is_learned(
    measured: Measured, short: Mapping[str, int], changed: Mapping[str, int | None]
) -> None:
    assert learn({"n2": measured}, short, DEVICE_MTUS) == changed


def test_only_what_changes_is_learned() -> None:
    measured = {"n2": Measured(4, 1400), "n3": Measured(4, 1500), "n4": Measured(6, 1500)}
    assert learn(measured, {"n2": 1400, "n4": 1300, "n9": 1300}, DEVICE_MTUS) == {"n4": None}


@pytest.mark.parametrize(
    ("endpoint", "path_mtu_bytes", "inner"),
    [
        pytest.param("192.0.2.2", 1400, 1350, id="IPv4 wire"),
        pytest.param("2001:db8::2", 1400, 1330, id="IPv6 wire"),
        pytest.param("192.0.2.2", 9000, 1450, id="never more than the pods' own"),
    ],
)
def test_the_fast_path_sends_no_more(endpoint: str, path_mtu_bytes: int, inner: int) -> None:
    peer = record(2, "10.42.2.0/24", endpoint=endpoint)
    slots = {"n2": 1}
    before = tables_for([peer], previous=slots, mtu_bytes=MTUS, max_slots=4)
    after = tables_for(
        [peer], previous=slots, mtu_bytes=MTUS, max_slots=4, short_paths={"n2": path_mtu_bytes}
    )
    wanted = replace(before.paths[1], mtu_bytes=inner)
    assert diff(before, after) == ((SetPath(1, wanted),) if wanted != before.paths[1] else ())


def test_prefixes_of_short_paths_get_their_mtu() -> None:
    peers = [
        (record(2, "10.42.2.0/24", "fd42:0:0:2::/64"), path(2, 1350)),
        (record(3, "10.42.3.0/24", "fd42:0:0:3::/64"), path(3, 1450)),
        (record(4, "10.42.4.0/24", "fd42:0:0:4::/64"), path(4, 1279)),
        (record(5, "10.42.5.0/24", "fd42:0:0:5::/64"), path(5, 1280)),
    ]
    assert prefix_mtus(peers, 1450) == networks(
        {
            "10.42.2.0/24": 1350,
            "fd42:0:0:2::/64": 1350,
            "10.42.4.0/24": 1279,
            "10.42.5.0/24": 1280,
            "fd42:0:0:5::/64": 1280,
        }
    )


def test_a_path_that_leaves_pods_their_mtu_needs_no_route() -> None:
    """As over IPv4, with an IPv6 underlay besides that made the pods' MTU smaller."""
    assert prefix_mtus([(record(2, "10.42.2.0/24"), path(2, 1440))], 1430) == {}


@pytest.mark.parametrize(
    ("count", "sizes", "pause"),
    [
        (0, [0], LOOK_SECONDS),
        (1, [1], LOOK_SECONDS),
        (LOOK_PEERS, [LOOK_PEERS], LOOK_SECONDS),
        (LOOK_PEERS + 1, [LOOK_PEERS, 1], LOOK_SECONDS / 2),
        (10_000, [LOOK_PEERS] * 39 + [16], MIN_PAUSE_SECONDS),
    ],
)
def test_a_round_looks_at_every_peer_once(count: int, sizes: list[int], pause: float) -> None:
    node_ids = [f"n{number}" for number in range(count)]
    found = list(slices(node_ids))
    assert [len(some) for some, _ in found] == sizes
    assert [node_id for some, _ in found for node_id in some] == node_ids
    assert {seconds for _, seconds in found} == {pause}


def test_the_news() -> None:
    peers = [(record(2, "10.42.2.0/24", "fd42:0:0:2::/64"), path(2, 1250)), (record(3), path(3, 1450))]
    assert list(news({"n2": 1300, "n3": None}, peers)) == [
        "the path MTU is less than the device's to n2 (1300)",
        "the path MTU is the device's again to n3",
        "IPv6 needs an MTU of 1280, and less is left to n2: its packets that do not fit are dropped "
        "(TOO_BIG); raise the MTU on the way there",
    ]
    only4 = [(record(2, "10.42.2.0/24"), path(2, 1250))]
    assert len(list(news({"n2": 1300}, only4))) == 1


def test_the_news_of_a_shrunken_device_is_one_line() -> None:
    changed = {f"n{number}": 1400 for number in range(MAX_NAMED + 3)}
    (line,) = news(changed, [])
    assert line.endswith(f"n{MAX_NAMED - 1} (1400) and 3 more")


def test_the_prober_asks_the_kernel() -> None:
    with Prober([ip_address("127.0.0.1")]) as prober:
        loopback = prober.ask(ip_address("127.0.0.2"), 6081)
        assert loopback is not None
        assert loopback > 1500
        # Connecting from a loopback address to elsewhere is refused: there is no such path.
        assert prober.ask(ip_address("192.0.2.1"), 6081) is None
        assert prober.ask(ip_address("127.0.0.2"), 6081) == loopback
