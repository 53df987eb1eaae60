"""A pod's datagrams to nodes' tunnel ports, whichever the configuration makes them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.netns.nodes import Node
from tests.netns.pods import SERVICE, UNDERLAY, VERSIONS, family_of, in_namespace, lead, plug, require_nft
from tests.netns_tools import Namespace

pytestmark = pytest.mark.root

GENEVE, VXLAN, OTHER = 7081, 7789, 7000


def open_receiver(address: str, port: int) -> socket.socket:
    receiver = socket.socket(family_of(address), socket.SOCK_DGRAM)
    receiver.bind((address, port))
    return receiver


def send_each(address: str, ports: tuple[int, ...]) -> None:
    """One datagram to each port, in this order."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as sender:
        for port in ports:
            sender.sendto(str(port).encode(), (address, port))


@VERSIONS
def test_a_pod_cannot_send_to_the_configured_tunnel_ports_of_a_node(
    pair: tuple[Node, Node], netns: Callable[[], Namespace], version: int
) -> None:
    """The last datagram, to another port, shows that those before it would have come."""
    require_nft()
    one, two = pair
    one.tables["tunnel"] = {"geneve_port": GENEVE, "vxlan_ports": [VXLAN]}
    one.start()
    pod = netns()
    plug(one, pod)
    address = UNDERLAY[version].format(2)
    with ExitStack() as stack:
        receivers = {
            port: stack.enter_context(in_namespace(two.namespace, open_receiver, address, port))
            for port in (GENEVE, VXLAN, OTHER)
        }
        in_namespace(pod, send_each, address, (GENEVE, VXLAN, OTHER))
        receivers[OTHER].settimeout(5.0)
        assert receivers[OTHER].recv(100) == b"7000"
        for port in (GENEVE, VXLAN):
            receivers[port].setblocking(False)
            with pytest.raises(BlockingIOError):
                receivers[port].recv(100)


@VERSIONS
def test_the_nodes_address_is_not_lent_to_datagrams_for_tunnel_ports(
    pair: tuple[Node, Node], netns: Callable[[], Namespace], version: int
) -> None:
    """A Service leads past what a pod itself may send to. Peers would take the datagram for the node's."""
    require_nft()
    one, two = pair
    one.tables["tunnel"] = {"geneve_port": GENEVE, "vxlan_ports": [VXLAN]}
    one.start()
    pod = netns()
    own = plug(one, pod)
    address, seen = UNDERLAY[version].format(2), {}
    for port in (GENEVE, VXLAN, OTHER):
        lead(one, version, "udp", 1000 + port, address, port)
        with in_namespace(two.namespace, open_receiver, address, port) as receiver:
            receiver.settimeout(5.0)
            in_namespace(pod, send_each, SERVICE[version], (1000 + port,))
            seen[port] = receiver.recvfrom(100)[1][0]
    assert seen == {GENEVE: own[version], VXLAN: own[version], OTHER: UNDERLAY[version].format(1)}
