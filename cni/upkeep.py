"""GC and STATUS: what a runtime asks about the node and not about one pod."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from cni import bpf, delegate, guard
from cni.commands import ALIAS_MARK, NO_GUARD, NodeNetwork, alias_of, delete_port
from cni.netconf import OWN_IPAM, NetConf, ipam_type_of, parse_netconf, quarantine_of
from cni.netlink import Netlink
from cni.request import Attachment, Request
from cni.result import CniError, Code
from cni.store import Store, StoreError

Exclusively = Callable[[Attachment], AbstractContextManager[object]]
"""Keeps other calls for an attachment out while it is entered."""


def collect(request: Request, store: Store, host: Netlink, exclusively: Exclusively, now: float) -> None:
    """Remove what `request.network` has for attachments that are not valid any more.

    `now` is when the call came in: an ADD that ended later is newer than the list of valid ones, whatever
    the list says. What fails is left for the next time, and told at the end.
    """
    ipam_type, rest_s = ipam_type_of(request.config or {}), quarantine_of(request.config or {})
    failures = []
    for record in store.records(request.network):
        attachment = record.attachment
        if (attachment.container, attachment.ifname) in request.valid:
            continue
        try:
            with exclusively(attachment):
                _collect_one(attachment, store, host, now, rest_s)
        except (CniError, StoreError, OSError) as error:
            failures.append(f"{attachment.container}/{attachment.ifname}: {error}")
    failures += _collect_links(request, store, host, exclusively)
    if ipam_type != OWN_IPAM:
        try:
            delegate.call(ipam_type, request)
        except CniError as error:
            failures.append(error.msg)
    if failures:
        raise CniError(Code.GC_INCOMPLETE, f"{len(failures)} of the removals failed", "; ".join(failures))


def status(request: Request, network: NodeNetwork, store: Store, host: Netlink, now: float) -> None:
    """CniError 50 or 51 unless an ADD would work now."""
    bridge = host.find_link(network.bridge)
    if bridge is None or not bridge.up:
        state = "missing" if bridge is None else "down"
        raise CniError(Code.LIMITED_CONNECTIVITY, f"the pods' bridge {network.bridge} is {state}")
    tap = host.find_link(network.tap) if network.tap else None
    if network.tap and (tap is None or not tap.up or tap.master != bridge.index):
        state = "missing" if tap is None else "down" if not tap.up else f"not a port of {network.bridge}"
        raise CniError(
            Code.LIMITED_CONNECTIVITY, f"the way to the other nodes is cut: {network.tap} is {state}"
        )
    conf = parse_netconf(request.config or {}, {})
    try:
        _status_of_addresses(request, conf, network, store, now)
    except CniError as error:
        raise CniError(Code.CANNOT_ADD, error.msg, error.details) from None
    if conf.spoof_check and not _guard_loads(network):
        raise CniError(Code.CANNOT_ADD, NO_GUARD)


def _status_of_addresses(
    request: Request, conf: NetConf, network: NodeNetwork, store: Store, now: float
) -> None:
    if conf.delegated:
        delegate.call(conf.ipam_type, request)
        return
    without = store.exhausted(network.range_sets(conf), now)
    if without:
        raise CniError(Code.CANNOT_ADD, without)


def _guard_loads(network: NodeNetwork) -> bool:
    pod = guard.Allowance("02:00:00:00:00:01", network.gateways, network.cluster_cidrs, network.tunnel_ports)
    try:
        os.close(bpf.load(guard.program(pod)))
    except bpf.BpfError:
        return False
    return True


def _collect_one(attachment: Attachment, store: Store, host: Netlink, began: float, rest_s: float) -> None:
    record = store.find(attachment)  # again: it may have changed until we were alone with it
    if record is None or max(record.reserved_at, record.attached_at or 0.0) >= began:
        return
    delete_port(attachment, host)
    store.release(attachment, began, rest_s)


def _collect_links(request: Request, store: Store, host: Netlink, exclusively: Exclusively) -> list[str]:
    """Host ends that bear our mark for this network but have no record: those of a lost store."""
    kept = {alias_of(Attachment(request.network, container, ifname)) for container, ifname in request.valid}
    mark = f"{ALIAS_MARK}{request.network}/"
    failures = []
    for link in host.links():
        if link.kind != "veth" or not link.alias.startswith(mark) or link.alias in kept:
            continue
        container, _, ifname = link.alias.removeprefix(mark).partition("/")
        attachment = Attachment(request.network, container, ifname)
        try:
            with exclusively(attachment):
                if store.find(attachment) is None:
                    delete_port(attachment, host)
        except (StoreError, OSError) as error:
            failures.append(f"{link.name}: {error}")
    return failures
