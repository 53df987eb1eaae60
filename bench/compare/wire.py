"""What lies between the two nodes. A veth pair takes everything a card might be asked for and crosses no
wire, so what is measured over it flatters everybody; the other two wires take that away."""

from __future__ import annotations

from pathlib import Path

from pyroute2.ethtool.ioctl import IoctlEthtool

from bench.compare.pods import ip
from forwarder.demo import netns
from forwarder.demo.lab import Host, LabError

ABOUT = {
    "veth": "a veth pair as it comes: superframes cross it whole, and no checksum is ever computed for it",
    "nic": "every transmit offload off and GRO on, as a card without tunnel offload",
    "bare": "every transmit offload off, and GRO off too",
}


def lay(wire: str, one: Host, other: Host) -> None:
    """Join two hosts directly, by a link `eth0` in each. The lab's own wire is a bridge: with single frames
    it would cost these CPUs what on real machines a switch does."""
    for host in (one, other):
        ip(host.namespace, "link delete eth0")
    ip(one.namespace, f"link add eth0 mtu 1500 type veth peer name eth0 mtu 1500 netns {other.namespace}")
    for host in (one, other):
        _set_features(wire, host.namespace, "eth0")
        ip(
            host.namespace,
            f"""address add {host.underlay["ipv4"]}/24 dev eth0
                link set eth0 up""",
        )


def _set_features(wire: str, namespace: Path, link: str) -> None:
    """What `ethtool -K` would do. Scatter-gather stays: it is how a card reads a packet, and without it the
    kernel copies each one once more."""
    if wire == "veth":
        return
    with netns.inside(namespace):
        device = IoctlEthtool(link)
        try:
            features = device.get_features()
            wanted = {
                name: False
                for name in features.keys()  # noqa: SIM118 (it is no dict)
                if name.startswith("tx-") and features.is_active(name) and features.is_available(name)
            }
            del wanted["tx-scatter-gather"]
            wanted["rx-gro"] = wire == "nic"
            for name, on in wanted.items():
                features.set_value(name, on)
            device.set_features(features)
            now = device.get_features()
            refused = [name for name, on in wanted.items() if now.is_active(name) != on]
        finally:
            device.close()
    if refused:
        raise LabError(f"{link} in {namespace.name} does not change {', '.join(refused)}")
