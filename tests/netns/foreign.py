"""What the interop tests share: a pod behind a router that is not ours, and how it must talk with ours."""

from __future__ import annotations

import os

from forwarder.demo.lab import Host, Lab, Node, link_index, netlink
from forwarder.demo.probes import Station, ping, transfer, udp_echo

INNER_MTU = {"ipv4": 1450, "ipv6": 1430}
"""1500 less the outer headers of VXLAN, or of Geneve without options."""

NO_CHECKSUM_OFFLOAD = ("tx-checksum-ip-generic", "tx-udp-segmentation")
"""With these off a veth's frames have their checksums and fit the MTU, as they do behind a network card."""

NODAD = {"flags": 0x02}


def add_pod_behind(lab: Lab, host: Host, mtu: int) -> Station:
    """A namespace joined to the host by a veth pair: `eth0` there, `pod0`, up and bare, at the host. It
    has the first pod's addresses of the host's prefixes."""
    namespace = lab.add_namespace("behind")
    with netlink(host.namespace) as ip, namespace.open("rb") as there:
        peer = {"ifname": "eth0", "mtu": mtu, "net_ns_fd": there.fileno()}
        ip.link("add", ifname="pod0", kind="veth", mtu=mtu, peer=peer)
        ip.link("set", index=link_index(ip, "pod0"), state="up")
    addresses = [prefix[2] for prefix in host.prefixes]
    with netlink(namespace) as ip:
        index = link_index(ip, "eth0")
        for address, prefix in zip(addresses, host.prefixes, strict=True):
            options = NODAD if address.version == 6 else {}
            ip.addr("add", index=index, address=str(address), prefixlen=prefix.prefixlen, **options)
        ip.link("set", index=index, state="up")
        for gateway in host.gateways:
            ip.route("add", dst="::/0" if ":" in gateway else "0.0.0.0/0", gateway=gateway, oif=index)
    return Station("behind", namespace, tuple(str(address) for address in addresses))


def assert_they_talk(lab: Lab, node: Node, ours: Station, theirs: Station) -> None:
    """Ping, a hashed transfer and inner fragments, both ways, IPv4 and IPv6; and nothing was dropped."""
    lost = ping([(ours, theirs), (theirs, ours)]).lost
    assert not lost, lost
    payload = os.urandom(8 << 20)
    for source, destination in ((ours, theirs), (theirs, ours)):
        for address in destination.ips:
            result = transfer(source, destination, address, payload)
            assert result.hash_ok, result
            assert udp_echo(source, destination, address, 2000, 5).fault is None
    for direction, reasons in lab.ask(node, "drops").items():
        assert not any(reasons.values()), (direction, reasons)
