"""Brings pods that run to a node that has changed under them: another MTU, or a bridge that was made anew.

Where a pod lives was told by its ADD only. It is found again among the namespaces that are mounted where
runtimes mount them and those that processes live in, by its interface: the other end of our port, with an
address that is held for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cni import netns
from cni.commands import NodeNetwork, alias_of, is_port_of
from cni.netlink import Link, Netlink
from cni.request import Attachment
from cni.store import Record

_NAMESPACES = Path("/run/netns")

Exclusively = Callable[[Attachment], AbstractContextManager[object]]
"""Keeps other calls for an attachment out while it is entered."""


def reattach(
    records: Sequence[Record],
    before: NodeNetwork,
    network: NodeNetwork,
    host: Netlink,
    exclusively: Exclusively,
) -> list[str]:
    """Make each pod's link what ADD would make it now, where it differs; what could not be done, in words."""
    bridge = host.find_link(network.bridge)
    if bridge is None:
        return [f"pods are not attached: the bridge {network.bridge} is missing"]
    faults = []
    waiting: dict[int, tuple[Record, int]] = {}
    for record in records:
        with exclusively(record.attachment):
            port = host.find_link(record.host_ifname)
            if port is None or record.attached_at is None or not is_port_of(record.attachment, port):
                continue  # CHECK tells of it.
            try:
                mtu = mtu_of(port, before, network)
                if port.master != bridge.index:
                    host.set_link(port.name, master=bridge.index)
                    host.set_port_up(port.name, alias_of(record.attachment))
                if mtu != port.mtu:
                    host.set_link(port.name, mtu=mtu)
                    waiting[port.index] = record, mtu
            except OSError as error:
                faults.append(str(error))
    return faults + _resize_pods(waiting, network.gso_max_segs)


def mtu_of(port: Link, before: NodeNetwork, network: NodeNetwork) -> int:
    """The MTU of a pod's link now: the node's, unless it has less than the node had, as it was asked for."""
    return network.mtu if port.mtu == before.mtu else min(port.mtu, network.mtu)


def _resize_pods(waiting: dict[int, tuple[Record, int]], gso_max_segs: int | None) -> list[str]:
    """Set the pods' ends of these ports, by their index, to these MTUs."""
    faults = []
    for namespace in _namespaces():
        if not waiting:
            break
        try:
            with _opened(namespace) as netns_fd, netns.call_in(netns_fd, Netlink) as pod:
                for link in _ends_of(waiting, pod):
                    assert link.peer is not None  # noqa: S101 (found by it)
                    _, mtu = waiting.pop(link.peer)
                    pod.set_link(link.name, mtu=mtu, gso_max_segs=gso_max_segs)
        except OSError as error:
            # A namespace may end while it is looked at; of one of ours that is told by what is left.
            if not isinstance(error, FileNotFoundError | ProcessLookupError):
                faults.append(f"{namespace}: {error}")
    left = ", ".join(
        f"{record.attachment.container}/{record.attachment.ifname}" for record, _ in waiting.values()
    )
    if left:
        faults.append(
            f"the MTU of these pods is not changed, their namespaces are nowhere to be found: {left}"
        )
    return faults


def _ends_of(waiting: dict[int, tuple[Record, int]], pod: Netlink) -> Iterator[Link]:
    for link in pod.links():
        if link.kind != "veth" or link.peer not in waiting:
            continue
        record, _ = waiting[link.peer]
        addresses = {address for address, _ in pod.addresses(link.index)}
        if link.name == record.attachment.ifname and any(
            lease.address in addresses for lease in record.leases
        ):
            yield link


def _namespaces() -> Iterator[Path]:
    """Every network namespace once, but for our own."""
    seen = {_identity(Path("/proc/self/ns/net"))}
    mounted = _NAMESPACES.iterdir() if _NAMESPACES.is_dir() else iter(())
    for path in (*mounted, *Path("/proc").glob("[0-9]*/ns/net")):
        if (identity := _identity(path)) is not None and identity not in seen:
            seen.add(identity)
            yield path


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not netns.is_netns(descriptor):
            raise FileNotFoundError(path)
        yield descriptor
    finally:
        os.close(descriptor)
