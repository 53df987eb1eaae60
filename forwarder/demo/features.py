"""A link's offloads, switched as `ethtool -K` does it."""

from __future__ import annotations

from pathlib import Path

from pyroute2.ethtool.ioctl import IoctlEthtool

from forwarder.demo import netns
from forwarder.demo.lab import LabError


def switch_off(namespace: Path, link: str, *names: str) -> None:
    """Switch off features by the kernel's own names ("tx-udp-segmentation"). LabError if one stays on."""
    with netns.inside(namespace):
        device = IoctlEthtool(link)
        try:
            features = device.get_features()
            for name in names:
                features.set_value(name, False)
            device.set_features(features)
            left = [name for name in names if device.get_features().is_active(name)]
        finally:
            device.close()
    if left:
        raise LabError(f"{link} in {namespace.name} keeps {', '.join(left)} on")
