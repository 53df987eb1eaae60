"""Two pods behind two hosts, and the topology that systems share: pods routed on isolated ports of a bridge,
so that their traffic passes the host's IP stack on both sides. iproute2 does it, from text that can be tried
by hand."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwarder.demo import netns
from forwarder.demo.lab import Host, Lab, LabError, deferred_interrupts, popen

COMMAND_SECONDS = 20.0
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Pair:
    """A system ready to be measured: load goes from the client's pod to the server's. `forwarders` are the
    processes that move its packets, none if the kernel does."""

    client: Path
    server: Path
    address: str
    forwarders: tuple[int, ...] = ()


def run(
    namespace: Path,
    *command: str,
    text: str = "",
    environment: dict[str, str] | None = None,
    seconds: float = COMMAND_SECONDS,
) -> str:
    """What the command prints. LabError with what it complains of if it fails."""
    process = popen(
        namespace,
        list(command),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            output, errors = process.communicate(text.encode(), timeout=seconds)
        except BaseException as error:
            process.kill()
            process.wait()  # Popen does not, after Ctrl-C
            if isinstance(error, subprocess.TimeoutExpired):
                message = f"{command[0]} in {namespace.name} did not end in {seconds:.0f} s"
                raise LabError(message) from error
            raise
    if process.returncode != 0:
        said = (errors or output).decode(errors="replace").strip()
        raise LabError(f"{command[0]} in {namespace.name} failed: {said}")
    return output.decode()


def start(stack: ExitStack, namespace: Path, *command: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process that ends with the stack."""
    with deferred_interrupts():
        process = popen(namespace, list(command), stdin=subprocess.DEVNULL, **options)
        stack.callback(_stop, process)
        return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ip(namespace: Path, lines: str) -> None:
    run(namespace, "ip", "-batch", "-", text=lines)


def bridge(namespace: Path, lines: str) -> None:
    run(namespace, "bridge", "-batch", "-", text=lines)


def sysctl(namespace: Path, name: str, value: str) -> None:
    with netns.inside(namespace):
        Path("/proc/sys", *name.split("/")).write_text(value)


def pod_address(host: Host) -> str:
    return str(host.prefixes[0][9])


def add_routed_pod(lab: Lab, host: Host, mtu: int) -> Path:
    """A bridge `loom0` with the host's gateway address, and a pod on an isolated port of it."""
    pod = lab.add_namespace(f"p-{host.name}")
    ip(
        host.namespace,
        f"""link add loom0 address {host.router_mac} mtu {mtu} type bridge
            link set loom0 up
            address add {host.gateways[0]}/24 dev loom0
            link add pod0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod}
            link set pod0 master loom0 up""",
    )
    bridge(host.namespace, "link set dev pod0 isolated on")
    sysctl(host.namespace, "net/ipv4/ip_forward", "1")
    # The way to the other node may lead out of the bridge again; pods are not to be told of a shorter one.
    sysctl(host.namespace, "net/ipv4/conf/all/send_redirects", "0")
    sysctl(host.namespace, "net/ipv4/conf/loom0/send_redirects", "0")
    ip(
        pod,
        f"""link set lo up
            address add {pod_address(host)}/32 dev eth0
            link set eth0 up
            route add {host.gateways[0]} dev eth0
            route add default via {host.gateways[0]}""",
    )
    return pod
