"""`podloom cni install`, `podloom cni uninstall` and `podloom pods`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cni.client import DEFAULT_SOCKET
from cni.plugin import DEFAULT_STATE_DIR


def add_cni_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, about in (
        ("install", "place the plugin, then the configuration that makes runtimes use it"),
        ("uninstall", "take both away again"),
    ):
        action = actions.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        action.add_argument("--bin-dir", type=Path, default=Path("/opt/cni/bin"), help="default: %(default)s")
        action.add_argument(
            "--conf-dir", type=Path, default=Path("/etc/cni/net.d"), help="default: %(default)s"
        )
        action.set_defaults(action=name)
        if name == "install":
            action.add_argument("--network", default="podloom", help="the network's name (%(default)s)")
            action.add_argument("--socket", default=DEFAULT_SOCKET, help="default: %(default)s")
            action.add_argument("--state-dir", default=DEFAULT_STATE_DIR, help="default: %(default)s")


def run_cni(arguments: argparse.Namespace) -> int:
    from cni import install

    try:
        if arguments.action == "install":
            done = install.install(
                arguments.bin_dir,
                arguments.conf_dir,
                network=arguments.network,
                control_socket=arguments.socket,
                state_dir=arguments.state_dir,
            )
        else:
            done = install.uninstall(arguments.bin_dir, arguments.conf_dir)
    except install.InstallError as error:
        sys.stderr.write(f"podloom: {error}\n")
        return 1
    word = "wrote" if arguments.action == "install" else "removed"
    sys.stdout.writelines(f"{word} {path}\n" for path in done)
    return 0


def add_pods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.add_argument(
        "--state-dir", type=Path, default=Path(DEFAULT_STATE_DIR), help="the daemon's; default: %(default)s"
    )


def run_pods(arguments: argparse.Namespace) -> int:
    from cni.store import StoreError

    try:
        found = pods(arguments.state_dir)
    except StoreError as error:
        sys.stderr.write(f"podloom: {error}\n")
        return 1
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    rows = [("POD", "NETWORK", "INTERFACE", "ADDRESSES", "VETH", "SINCE")]
    rows += [
        (
            pod["pod"] or pod["container"][:12],
            pod["network"],
            pod["interface"],
            ",".join(pod["addresses"]),
            pod["veth"],
            pod["since"] or "unfinished",
        )
        for pod in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    return 0


def pods(state_dir: Path) -> list[dict[str, Any]]:
    """What is attached on this node, by network and container. Works without a daemon."""
    from cni.service import boot_clock, read_records

    booted_at = time.time() - boot_clock()
    return [
        {
            "pod": f"{record.pod_namespace}/{record.pod_name}" if record.pod_name else None,
            "container": record.attachment.container,
            "network": record.attachment.network,
            "interface": record.attachment.ifname,
            "addresses": [str(lease.address) for lease in record.leases],
            "veth": record.host_ifname,
            "since": None if record.attached_at is None else _time(booted_at + record.attached_at),
        }
        for record in read_records(state_dir)
    ]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
