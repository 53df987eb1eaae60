"""What the plugin is told of the node."""

from __future__ import annotations

import pytest

from forwarder.config import parse
from forwarder.daemon import node_network
from tests.unit.test_reconcile import WIRING

CONFIG = parse(
    """
    [cluster]
    cidrs = ["10.42.0.0/16", "fd42::/48"]
    [node]
    id = "a"
    endpoints = ["192.0.2.1"]
    prefixes = ["10.42.1.0/24", "fd42:0:0:1::/64"]
    [discovery]
    file = "/etc/podloom/peers.toml"
    """
)


@pytest.mark.parametrize(("uplink", "segments"), [(False, 44), (True, None)])
def test_one_superframe_of_a_pod_is_one_send(uplink: bool, segments: int | None) -> None:
    """44 datagrams of 1500 bytes' underlay are a send; the uplink takes whatever TCP makes."""
    assert node_network(CONFIG, WIRING, uplink=uplink).gso_max_segs == segments
