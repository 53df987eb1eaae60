"""What a person sees while the demo runs and at its end, and the same as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forwarder.demo.checks import Check, Outcome


class Progress:
    """Live progress on stderr: the step under way, and a line for each check that is done."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        with self._console.status(escape(what)):
            yield

    def done(self, check: Check) -> None:
        self._console.print(f"{_mark(check)} {escape(check.name)}: {escape(check.detail)}", soft_wrap=True)


def print_error(text: str) -> None:
    sys.stderr.write(f"podloom demo: {text}\n")


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def as_json(outcome: Outcome) -> dict[str, Any]:
    transferred = sum(transfer.bytes for transfer in outcome.transfers)
    seconds = sum(transfer.seconds for transfer in outcome.transfers)
    return {
        "ok": outcome.ok,
        "error": outcome.error,
        "encapsulation": outcome.encapsulation,
        "underlay": outcome.underlay,
        "seconds": round(outcome.seconds, 2),
        "nodes": outcome.nodes,
        "pods": [{"name": pod.name, "node": pod.node.name, "ips": list(pod.ips)} for pod in outcome.pods],
        "ping": {
            "sent": sum(pings.sent for pings in outcome.pings),
            "received": sum(pings.received for pings in outcome.pings),
        },
        "tcp": {
            "bytes": transferred,
            "gbps": round(transferred * 8 / seconds / 1e9, 3) if seconds else 0.0,
            "hash_ok": bool(outcome.transfers) and all(transfer.hash_ok for transfer in outcome.transfers),
        },
        "udp": {
            "sent": sum(echoes.sent for echoes in outcome.echoes),
            "received": sum(echoes.received for echoes in outcome.echoes),
        },
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in outcome.checks],
        "drops": outcome.drops,
        "kept_as": outcome.kept_as,
    }


def print_tables(outcome: Outcome) -> None:
    """The end of a run for a person, on stdout."""
    console = Console(highlight=False)
    checks = Table("", "check", "detail")
    checks.title = f"podloom demo: {outcome.nodes} nodes, {outcome.encapsulation} over {outcome.underlay}"
    for check in outcome.checks:
        checks.add_row(_mark(check), escape(check.name), escape(check.detail))
    console.print(checks)

    pods = Table("pod", "node", "addresses", title="pods at the end")
    for pod in outcome.pods:
        pods.add_row(escape(pod.name), escape(pod.node.name), escape("  ".join(pod.ips)))
    console.print(pods)

    if any(outcome.drops.values()):
        drops = Table("node", "drop reason", "packets", title="dropped by the daemons")
        for node, reasons in outcome.drops.items():
            for reason, count in sorted(reasons.items()):
                drops.add_row(escape(node), escape(reason), str(count))
        console.print(drops)
    verdict = "[green]every check held[/]" if outcome.ok else "[red]not every check held[/]"
    console.print(f"{verdict} ({outcome.seconds:.1f} s)")


def print_how_to_look(podloom: str, name: str, config_file: str, namespace: str) -> None:
    """How to get inside a demo that was kept, and how to end it."""
    sys.stdout.write(
        f"It is left running as {name}. To look inside:\n"
        f"  {podloom} status -c {config_file}\n"
        f"  nsenter --net=/run/netns/{namespace} ip address\n"
        f"  nsenter --net=/run/netns/{name}-wire tcpdump -ni wire\n"
        f"To remove it:\n"
        f"  {podloom} demo --remove {name}\n"
    )


def _mark(check: Check) -> str:
    return "[green]ok[/]" if check.ok else "[red]FAIL[/]"
