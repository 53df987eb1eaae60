"""Lends pods the node's own address for what lies outside the cluster, by one nftables table.

`ruleset` is pure: the text. It is applied by nft(8), because nftables takes a table as one transaction and
pyroute2 sends each object in one of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from typing import Final

from forwarder.addresses import Network
from forwarder.reconcile import Wiring

NFT_SECONDS: Final = 30.0

SBIN: Final = "/usr/sbin:/sbin"
"""Where nft is, and where not everybody's PATH leads."""

_FAMILIES: Final = ((4, "ip", "224.0.0.0/4"), (6, "ip6", "ff00::/8"))
"""IP version, nft's word for it, its multicast."""


class MasqueradeError(RuntimeError):
    """The table cannot be set or removed; the text says why and what to do."""


def table_of(wiring: Wiring) -> str:
    """The table's name, which is the mark that it is ours. The bridge's name makes it one daemon's alone."""
    return f"podloom-{wiring.bridge}"


def ruleset(wiring: Wiring, tunnel_ports: Iterable[int]) -> str:
    """Text for `nft -f` that puts the table in the place of an earlier one, in one transaction."""
    ports = _set_of(sorted(tunnel_ports))
    rules = [
        f'oifname "{wiring.bridge}" accept',
        # Peers know a node by its address: a pod's own words must not reach them as the node's datagrams,
        # nor by way of a Service that leads there.
        f"udp dport {ports} accept",
    ]
    for version, family, multicast in _FAMILIES:
        own = [prefix for prefix in wiring.usable_prefixes if prefix.version == version]
        inside = [cidr for cidr in wiring.cluster_cidrs if cidr.version == version]
        if own:
            outside = f"{family} daddr != {_set_of([*inside, multicast])}"
            rules.append(f"{family} saddr {_set_of(own)} {outside} masquerade fully-random")
    return "\n".join(
        [
            removal(wiring),
            f"table inet {table_of(wiring)} {{",
            "  chain postrouting {",
            "    type nat hook postrouting priority 100; policy accept;",
            *(f"    {rule}" for rule in rules),
            "  }",
            "}",
            "",
        ]
    )


def removal(wiring: Wiring) -> str:
    """Text for `nft -f` after which the table is not there, whether it was before or not."""
    return f"table inet {table_of(wiring)}\ndelete table inet {table_of(wiring)}"


def _set_of(members: Iterable[Network | str | int]) -> str:
    return "{ " + ", ".join(map(str, members)) + " }"


def ensure(wiring: Wiring, tunnel_ports: Iterable[int]) -> None:
    """Set the table. MasqueradeError if this host cannot."""
    try:
        _run_nft(ruleset(wiring, tunnel_ports))
    except FileNotFoundError:
        raise MasqueradeError(
            "node.ip_masquerade is true and this host has no nft: install nftables or set "
            "node.ip_masquerade = false"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise MasqueradeError(
            f"node.ip_masquerade is true and nft cannot set the table {table_of(wiring)}: {_reason(error)}; "
            "load the kernel's nf_tables, nft_chain_nat and nft_masq, or set node.ip_masquerade = false"
        ) from None


def remove(wiring: Wiring) -> None:
    """Take the table away if there is one. MasqueradeError if it is there and stays."""
    try:
        if table_of(wiring) not in _run_nft("list tables inet").split():
            return
    except (OSError, subprocess.SubprocessError):
        return  # Without nft, or on a kernel without nf_tables, there is none.
    try:
        _run_nft(removal(wiring))
    except (OSError, subprocess.SubprocessError) as error:
        raise MasqueradeError(
            f"nft cannot remove the table {table_of(wiring)}: {_reason(error)}; remove it by hand "
            f"(nft delete table inet {table_of(wiring)})"
        ) from None


def _run_nft(text: str) -> str:
    """What nft says to a text. FileNotFoundError if there is no nft; CalledProcessError if it refuses."""
    program = shutil.which("nft", path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if program is None:
        raise FileNotFoundError
    done = subprocess.run(  # noqa: S603
        [program, "-f", "-"], input=text, capture_output=True, text=True, check=True, timeout=NFT_SECONDS
    )
    return done.stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        return str(error.stderr).splitlines()[0]
    return str(error)
