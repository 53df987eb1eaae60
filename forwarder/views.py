"""What the daemon answers, for a person to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS: Final = 400
"""What is read by `grep` must not be folded to a terminal's width."""


def show(verb: str, answer: Any) -> None:
    """Print one verb's answer on stdout."""
    # No markup: what is shown holds brackets of its own.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    for part in _VIEWS[verb](answer):
        console.print(part)


def _status(status: dict[str, Any]) -> list[Any]:
    discovery = status["discovery"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    vxlan = ", ".join(map(str, status["ports"]["vxlan"])) or "none"
    for name, value in (
        ("node", status["node_id"]),
        ("version", f"{status['version']}, up {_duration(status['uptime_seconds'])}"),
        ("endpoints", ", ".join(status["endpoints"])),
        ("prefixes", ", ".join(status["prefixes"])),
        ("links", f"{status['links']['bridge']}, {status['links']['tap']}, MTU {status['mtu']}"),
        ("encapsulation", f"{status['encapsulation']}, VNI {status['vni']}"),
        ("UDP ports", f"geneve {status['ports']['geneve']}, vxlan {vxlan}"),
        ("peers", f"{status['peers']} from {discovery['source']}, {_age(discovery)}"),
    ):
        facts.add_row(name, value)
    if status["bgp"] is not None:
        facts.add_row("BGP", status["bgp"]["fault"] or "BIRD has this node's prefixes")
    for name, offload in status["offloads"].items():
        facts.add_row(name, "on" if offload["on"] else f"off: {offload['reason']}")
    parts: list[Any] = [facts]
    if status["fault"]:
        parts.append(Text(status["fault"], style="bold red"))
    if discovery["fault"]:
        parts.append(Text(f"the peers are not up to date: {discovery['fault']}", style="bold red"))
    if discovery["unannounced"]:
        parts.append(Text(discovery["unannounced"], style="bold red"))
    parts.append("")
    counters = Table("", "received", "forwarded", "bytes", box=None)
    for column in counters.columns[1:]:
        column.justify = "right"
    for direction, counted in status["counters"].items():
        numbers = (counted["received"], counted["forwarded"], counted["forwarded_bytes"])
        counters.add_row(direction, *map(_count, numbers))
    parts.append(counters)
    return parts


def _peers(peers: list[dict[str, Any]]) -> list[Any]:
    if not peers:
        return ["no peers"]
    any_short = any(peer["path_mtu"] is not None for peer in peers)
    path_mtu = ["path MTU"] if any_short else []
    headings = ("peer", "endpoint", "by", "prefixes", "path", "health", "RTT", "loss", *path_mtu)
    table = Table(*headings, "encap", "bytes", "decap", "bytes", box=None)
    for column in table.columns[5:]:
        column.justify = "right"
    for peer in peers:
        counted = peer["counters"]
        table.add_row(
            peer["id"],
            peer["endpoint"],
            f"{peer['encapsulation']} {peer['port']}",
            "\n".join(peer["prefixes"]),
            _ways(peer),
            *_health(peer["health"]),
            *([_optional(peer["path_mtu"])] if any_short else []),
            *(
                _count(counted[name])
                for name in ("encap_packets", "encap_bytes", "decap_packets", "decap_bytes")
            ),
        )
    return [table]


def _ways(peer: dict[str, Any]) -> str:
    """One line for all prefixes if they are reached alike, one beside each if not."""
    if peer["path"] != "mixed":
        return f"{peer['path']}: {peer['why']}"
    return "\n".join(f"{way['path']}: {way['why']}" for way in peer["paths"].values())


def _health(health: dict[str, Any]) -> tuple[Text, str, str]:
    """State, round trip time, and loss there and back."""
    if "since_seconds" not in health:
        return Text(health["state"]), "", ""
    state = Text(f"{health['state']} {_duration(health['since_seconds'])}")
    if health["fault"]:
        state = Text(f"{state}: {health['fault']}", style="bold red")
    rtt = health["smoothed_rtt_seconds"]
    losses = [health["encap_loss"], health["decap_loss"]]
    loss = "/".join("?" if share is None else f"{100 * share:.0f} %" for share in losses)
    return state, "" if rtt is None else f"{1000 * rtt:.2f} ms", "" if losses == [None, None] else loss


def _drops(drops: dict[str, dict[str, int]]) -> list[Any]:
    table = Table("direction", "reason", "dropped", box=None)
    table.columns[-1].justify = "right"
    for direction, reasons in drops.items():
        for reason, count in reasons.items():
            if count:
                table.add_row(direction, reason, _count(count))
    return [table if table.rows else "nothing was dropped"]


def _offload(offload: dict[str, Any]) -> list[Any]:
    return ["on" if offload["on"] else f"off: {offload['reason']}"]


def _names(names: dict[str, Any]) -> list[Any]:
    if not names["ours"]:
        upstream = ", ".join(names["upstream"]) or "nobody: there is no upstream server"
        return [f"{names['name']} is not below {names['domain']}: asked of {upstream}"]
    if not names["records"]:
        return [f"{names['name']} has no record"]
    table = Table("name", "type", "TTL", "value", box=None)
    for record in names["records"]:
        table.add_row(record["name"], record["type"], str(record["ttl"]), record["value"])
    return [table]


def _count(number: int) -> str:
    return f"{number:,}"


def _optional(number: int | None) -> str:
    return "" if number is None else str(number)


def _age(discovery: dict[str, Any]) -> str:
    seconds = discovery["age_seconds"]
    if seconds is None:
        return "never known"
    if discovery["stored"]:
        return f"as they were kept on disk {_duration(seconds)} ago"
    return f"known for {_duration(seconds)}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


_VIEWS: Final[dict[str, Callable[[Any], list[Any]]]] = {
    "status": _status,
    "peers": _peers,
    "drops": _drops,
    "offload": _offload,
    "names": _names,
}
