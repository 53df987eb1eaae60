"""A Service's address, rewritten in the host as kube-proxy does, between pods of one node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netns.nodes import Node
from tests.netns.pods import PORT, SERVICE, VERSIONS, lead, plug, require_nft, source_seen
from tests.netns_tools import Namespace

pytestmark = pytest.mark.root

NAME = {4: "iptables", 6: "ip6tables"}


@pytest.fixture(autouse=True)
def needs(root: None) -> None:
    require_nft()
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("br_netfilter is not loaded: keeping it off is NOT tested in this run")


@VERSIONS
def test_a_service_is_reached_where_br_netfilter_was_on(
    node: Node, netns: Callable[[], Namespace], version: int
) -> None:
    switch = f"net/bridge/bridge-nf-call-{NAME[version]}"
    node.namespace.set_sysctl(switch, "1")
    node.start()
    assert node.namespace.sysctl(switch) == "0"
    pods = netns(), netns()
    client, backend = [plug(node, pod) for pod in pods]
    lead(node, version, "tcp", PORT, backend[version], PORT)
    assert source_seen(pods[1], backend[version], pods[0], SERVICE[version]) == client[version]

    # Why it is off: it filters every bridge, though loom0's own attribute asks for nothing.
    node.namespace.set_sysctl(switch, "1")
    (shown,) = node.namespace.ip_json("link", "show", "dev", "loom0")
    assert shown["linkinfo"]["info_data"][f"nf_call_{NAME[version]}"] == 0
    with pytest.raises(TimeoutError):
        source_seen(pods[1], backend[version], pods[0], SERVICE[version], seconds=1.0)
