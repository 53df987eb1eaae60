"""The composition root: what `podloom up` starts, in which order, and how it ends.

Above the line only configuration is read; below it the machine is touched, and every touch registers its
own undoing first thing after it succeeds.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import uvloop

from cni.service import CniService, NodeNetwork, read_records
from cni.store import StoreError
from forwarder import links, masquerade, paths
from forwarder.addresses import Address, Network, format_mac, gateway_of
from forwarder.config import SECTIONS, Config, DiscoveryConfig, load
from forwarder.control.messages import Request
from forwarder.control.server import ControlServer, VerbError
from forwarder.dataplane import MAX_SLOTS, DataPlane, DataPlaneError, Settings
from forwarder.discovery import Announced, Current, Item, Remove, Snapshot, Source, Trouble, Upsert, stored
from forwarder.discovery.static import StaticSource
from forwarder.faults import ConfigError, Fault
from forwarder.links import LinkError
from forwarder.masquerade import MasqueradeError
from forwarder.names.pods import pods_of
from forwarder.names.records import Replace
from forwarder.names.service import NamesError, NameService
from forwarder.names.settings import Settings as NamesSettings
from forwarder.node import IdentityError, gateway_mac, identify
from forwarder.offloads import ABOUT
from forwarder.paths import MIN_IPV6_MTU_BYTES, Measured, Prober
from forwarder.peers import (
    OPTION_BYTES,
    OVERHEAD_BYTES,
    PeerPath,
    PeerRecord,
    Tables,
    check,
    diff,
    tables_for,
)
from forwarder.reconcile import Wiring, wanted
from forwarder.registry import Delta, Registry, Said
from forwarder.uplink import UplinkError, open_uplink
from forwarder.version import podloom_version

log = logging.getLogger("podloom")

MAX_DATAGRAM_BYTES: Final = 65507
"""The largest UDP payload over IPv4, which bounds a run of datagrams too (UDP_SEGMENT)."""

INNER_HEADER_BYTES: Final = 8 + 14
"""Of every datagram: the tunnel header and the inner Ethernet header."""

CNI_WORKERS: Final = 8

MAX_REFUSALS_TOLD: Final = 10
"""Of refused records in the log and in `status`: there may be as many as somebody likes to write."""

SAVE_SECONDS: Final = 1.0
"""Between two writings of the peers to disk."""

SWITCH_SECONDS: Final = 0.001
"""How long a CNI call may keep the interpreter while a packet waits. The default is five times that, on
top of each round trip whose batch needs the interpreter once; shorter only adds switches."""

CHANGEABLE: Final = {
    "tunnel.encapsulation",
    "links.keep_on_exit",
    *(f"discovery.{item.name}" for item in fields(DiscoveryConfig)),
    "peers",
    "services",
    *(f"offload.{name}" for name in ABOUT if name != "uplink"),
}
"""What SIGHUP and `reload` take over while running. The rest names sockets and links that traffic uses."""


class StartError(RuntimeError):
    """The daemon cannot start or go on; the text says why and what to do."""


def run(path: Path) -> int:
    """Run until told to stop. Exit status: 0 stopped, 1 failed, 2 the configuration is refused."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="podloom: %(levelname)s: %(message)s")
    try:
        config = load(path)
        require_privileges()
        # ---- Above this line only configuration is read; below it the machine is touched. ----
        with run_directory(config.node.run_dir):
            config = identify(config)
            refuse(check(config.peers, config.local))
            daemon = Daemon(path, config)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(daemon.run())
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s: %s", path, fault)
        return 2
    except (StartError, LinkError, MasqueradeError, DataPlaneError, IdentityError, NamesError) as error:
        log.error("%s", error)
        return 1
    return 0


def require_privileges() -> None:
    """StartError unless this process may make links, and TAPs can be opened."""
    net_admin = 1 << 12  # CAP_NET_ADMIN, linux/capability.h
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    if not int(effective, 16) & net_admin:
        raise StartError(
            "podloom up makes links and routes, which needs CAP_NET_ADMIN: run it as root (sudo podloom up)"
        )
    if not links.TUN_DEVICE.exists():
        raise StartError(
            f"{links.TUN_DEVICE} is missing: load the tun module (modprobe tun), or hand the device into "
            "this container"
        )


@contextmanager
def run_directory(path: Path) -> Iterator[None]:
    """The directory of the control socket, ours alone and for one daemon at a time."""
    with ExitStack() as stack:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            lock = stack.enter_context((path / "lock").open("a"))
        except OSError as error:
            raise StartError(f"{path} cannot be used: {error.strerror}; correct node.run_dir") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another podloom runs on {path}: stop it first, or give this one its own node.run_dir"
            ) from None
        yield


def refuse(faults: list[Fault]) -> None:
    if faults:
        raise ConfigError(faults)


@dataclass(slots=True)
class DiscoveryState:
    """What `status` shows of the source. `updated_at` is when it was heard last; `stored_at`, in Unix time,
    is set while the peers are those kept on disk; `unannounced` says why the others are not told of us."""

    updated_at: float | None = None
    stored_at: float | None = None
    trouble: str | None = None
    unannounced: str | None = None


class Daemon:
    """One node's control plane. `config` is identified: id and router MAC are filled in."""

    def __init__(self, path: Path, config: Config) -> None:
        self._path = path
        self._config = config
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        self._slots: dict[str, int] = {}
        self._paths: dict[int, PeerPath] = {}
        self._records: dict[str, PeerRecord] = {}
        self._short_paths: dict[str, int] = {}
        self._discovery = DiscoveryState()
        self._refusals: tuple[str, ...] = ()
        self._unsaved = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()
        self._hang_ups: set[asyncio.Task[None]] = set()
        self._names: NameService | None = None
        self._pods_changed = asyncio.Event()

    async def run(self) -> None:
        """Start, forward until stopped, and end as the configuration says."""
        # The data path needs the interpreter once a batch, between which worker threads hold it.
        sys.setswitchinterval(SWITCH_SECONDS)
        async with AsyncExitStack() as stack:
            self._listen_to_signals()
            source = await self._settle()
            if source is None:
                return
            self._wiring, self._mtus = await asyncio.to_thread(plan_wiring, self._config)
            wiring = self._wiring
            tap = await asyncio.to_thread(links.open_tap, wiring.tap, wiring.node_id, wiring.router_mac)
            stack.push_async_callback(self._remove_links)
            stack.callback(tap.close)
            # Sockets before links: a port in use is the likeliest failure, and then nothing was made yet.
            self._dataplane = DataPlane(data_plane_settings(self._config, wiring), tap.fileno(), self._fail)
            stack.callback(self._dataplane.close)
            await asyncio.to_thread(set_masquerade, self._config, wiring)
            for operation in await asyncio.to_thread(links.ensure, wiring):
                log.debug("%s", operation)
            await self._open_uplink(stack)
            self._registry = Registry(self._config.local, capacity=MAX_SLOTS - 1)
            self._recall()
            stack.push_async_callback(self._save)
            await self._follow(source)
            stack.push_async_callback(self._unfollow)
            saver = asyncio.create_task(self._save_changes())
            stack.callback(saver.cancel)
            self._dataplane.start()
            self._routes = self._cluster_routes = wanted(wiring).routes
            watcher = asyncio.create_task(self._watch_paths())
            watcher.add_done_callback(self._follower_ended)
            stack.callback(watcher.cancel)
            self._cni = CniService(node_network(self._config, self._wiring), self._config.node.state_dir)
            stack.callback(self._cni.close)
            self._workers = ThreadPoolExecutor(CNI_WORKERS, thread_name_prefix="cni")
            stack.callback(self._workers.shutdown)
            if self._config.names.enabled:
                await self._start_names(stack)
            server = ControlServer(self._config.socket_path, self._answer)
            await server.open()
            stack.push_async_callback(server.close)
            stack.callback(notify, "STOPPING=1")
            notify("READY=1")
            log.info(
                "READY: node %s forwards for %s, %d peers, MTU %d, control socket %s",
                self._wiring.node_id,
                ", ".join(map(str, self._wiring.usable_prefixes)),
                len(self._records),
                self._wiring.mtu_bytes,
                self._config.socket_path,
            )
            await self._stopping.wait()
            log.info("stopping")
        if self._failure is not None:
            raise self._failure

    async def _open_uplink(self, stack: AsyncExitStack) -> None:
        """Use the uplink if it is wanted and passes its test; traffic goes without it otherwise."""
        choice, endpoints = self._config.offload.uplink, self._config.node.endpoints
        if choice == "off":
            return
        try:
            if choice == "auto":
                await asyncio.to_thread(require_tunnel_segmentation, endpoints)
            uplink = await asyncio.to_thread(
                open_uplink, self._config.links.uplink, self._wiring.node_id, endpoints
            )
        except UplinkError as error:
            log.info("no uplink: %s", error)
            self._dataplane.forgo_uplink(str(error))
            return
        stack.callback(uplink.close)
        self._dataplane.take_uplink(uplink)

    # Start and end

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._stopping.set()

    async def _remove_links(self) -> None:
        if not self._config.links.keep_on_exit:
            await asyncio.to_thread(links.remove, self._wiring)
            await asyncio.to_thread(masquerade.remove, self._wiring)

    # Peers

    async def _settle(self) -> Source | None:
        """The source, once this node has its prefixes by it; None if we are told to stop before."""
        self._stored = stored.read(self._config.node.state_dir, self._config.discovery.source)
        source = make_source(self._config, self._stored.prefixes if self._stored else ())
        asking = asyncio.ensure_future(source.own_prefixes())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not asking.done():
            asking.cancel()
            await asyncio.wait((asking,))
            await source.close()
            return None
        self._config = with_prefixes(self._config, asking.result())
        return source

    def _recall(self) -> None:
        """Begin with the peers of last time, until the source is heard."""
        if self._stored is not None:
            self._discovery.stored_at = self._stored.saved_at
            self._take_over(self._registry.replace(self._stored.said))

    async def _follow(self, source: Source) -> None:
        """Start following a source; returns when its first word has been applied, or at once if the
        peers of last time are there to go on with."""
        first = asyncio.Event()
        self._source = source
        self._follower = asyncio.create_task(self._apply_from(source, first.set))
        self._follower.add_done_callback(self._follower_ended)
        if self._discovery.stored_at is None:
            await first.wait()

    async def _unfollow(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
            await self._source.close()
            self._follower = None

    def _follower_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _apply_from(self, source: Source, applied: Callable[[], None]) -> None:
        try:
            async for item in source.watch():
                await self._apply(item)
                if not isinstance(item, Announced):
                    applied()
        finally:
            applied()

    async def _apply(self, item: Item) -> None:
        state, now = self._discovery, time.monotonic()
        match item:
            case Announced(fault):
                if fault is not None and fault != state.unannounced:
                    log.error("%s", fault)
                state.unannounced = fault
                return
            case Trouble(faults):
                for fault in faults:
                    log.error("peers not changed: %s", fault)
                state.trouble = "; ".join(faults)
                return
            case Current():
                pass
            case Snapshot(said):
                await self._replace(said)
                self._unsaved.set()
            case Upsert(key, said):
                self._take_over(self._registry.upsert(key, said))
            case Remove(key):
                self._take_over(self._registry.remove(key))
        state.updated_at, state.stored_at, state.trouble = now, None, None
        self._tell_refusals()

    async def _replace(self, said: Mapping[str, Said]) -> None:
        # In a thread: packets would wait while thousands of records are judged.
        judging = asyncio.ensure_future(asyncio.to_thread(self._registry.replace, said))
        try:
            await asyncio.shield(judging)
        finally:
            # Also when cancelled: the registry and the fast path must not part.
            await asyncio.wait([judging])
            self._take_over(judging.result())

    def _tell_refusals(self) -> None:
        refusals = tuple(map(str, islice(self._registry.faults, MAX_REFUSALS_TOLD)))
        for refusal in refusals:
            if refusal not in self._refusals:
                log.error("a peer's record is refused: %s", refusal)
        self._refusals = refusals

    def _take_over(self, delta: Delta) -> None:
        """Bring the fast path to what stands now; it costs what changed."""
        if not delta:
            return
        old = [self._records[node_id] for node_id in delta if node_id in self._records]
        new = [record for record in delta.values() if record is not None]
        before = self._tables_for(old)
        for node_id, record in delta.items():
            if record is None:
                self._slots.pop(node_id, None)
            if record is None or record.endpoints != self._records.get(node_id, record).endpoints:
                self._short_paths.pop(node_id, None)
        after = self._tables_for(new)
        changes = diff(before, after)
        self._dataplane.apply(changes)
        for slot in before.paths:
            self._paths.pop(slot, None)
        self._slots.update(after.slots)
        self._paths.update(after.paths)
        count = len(self._records)
        for record in old:
            del self._records[record.id]
        self._records.update((record.id, record) for record in new)
        self._unsaved.set()
        log.info("%d peers (%d before), %d changes", len(self._records), count, len(changes))

    def _tables_for(self, records: Iterable[PeerRecord]) -> Tables:
        return tables_for(
            records,
            previous=self._slots,
            mtu_bytes=self._mtus,
            max_slots=MAX_SLOTS,
            reserved=self._slots.values(),
            short_paths=self._short_paths,
            features=self._config.tunnel.features,
        )

    # Path MTUs

    async def _watch_paths(self) -> None:
        fault: str | None = None
        options = OPTION_BYTES if self._config.tunnel.remote_checksum else 0
        device_mtus = {
            version: mtu + OVERHEAD_BYTES[version] + options for version, mtu in self._mtus.items()
        }
        with Prober(self._config.node.endpoints) as prober:
            while True:
                for node_ids, pause in paths.slices(list(self._records)):
                    self._measure_paths(prober, node_ids, device_mtus)
                    try:
                        await self._route_short_paths()
                        fault = None
                    except LinkError as error:
                        if str(error) != fault:
                            fault = str(error)
                            log.error("pods are not told what their paths carry: %s", fault)
                    await asyncio.sleep(pause)

    def _measure_paths(self, prober: Prober, node_ids: Iterable[str], device_mtus: Mapping[int, int]) -> None:
        """Ask for these peers' path MTUs, and have them sent no more than that."""
        measured = {}
        for node_id in node_ids:
            if node_id in self._records:  # It may have gone since the round began.
                path = self._path_of(self._records[node_id])
                measured[node_id] = Measured(path.endpoint.version, prober.ask(path.endpoint, path.port))
        changed = paths.learn(measured, self._short_paths, device_mtus)
        if not changed:
            return
        records = [self._records[node_id] for node_id in changed]
        before = self._tables_for(records)
        for node_id, path_mtu_bytes in changed.items():
            if path_mtu_bytes is None:
                del self._short_paths[node_id]
            else:
                self._short_paths[node_id] = path_mtu_bytes
        after = self._tables_for(records)
        self._dataplane.apply(diff(before, after))
        self._paths.update(after.paths)
        for sentence in paths.news(changed, [(record, self._path_of(record)) for record in records]):
            log.warning("%s", sentence)

    async def _route_short_paths(self) -> None:
        """Bring the kernel's routes to what the paths carry: by them it tells pods."""
        records = (self._records[node_id] for node_id in self._short_paths)
        short = ((record, self._path_of(record)) for record in records)
        routes = paths.routes(self._cluster_routes, paths.prefix_mtus(short, self._wiring.mtu_bytes))
        if routes != self._routes:
            await asyncio.to_thread(links.change_routes, paths.changes(self._routes, routes))
            self._routes = routes

    def _path_of(self, record: PeerRecord) -> PeerPath:
        return self._paths[self._slots[record.id]]

    # The peers on disk

    async def _save_changes(self) -> None:
        while True:
            await self._unsaved.wait()
            await self._save()
            await asyncio.sleep(SAVE_SECONDS)

    async def _save(self) -> None:
        """Keep what stands, if the source said so and it is not kept yet."""
        if not self._unsaved.is_set() or self._discovery.updated_at is None:
            return
        self._unsaved.clear()
        config = self._config
        records = list(self._records.values())
        try:
            await asyncio.to_thread(
                stored.write,
                config.node.state_dir,
                config.discovery.source,
                time.time(),
                config.node.prefixes,
                records,
            )
        except OSError as error:
            log.warning("the peers are not kept in %s: %s", config.node.state_dir, error.strerror)

    # Names

    async def _start_names(self, stack: AsyncExitStack) -> None:
        names = self._names = NameService(names_settings(self._config, self._wiring))
        self._names.apply("static", Replace(self._config.services))
        await self._name_pods(self._names)
        stack.push_async_callback(self._names.close)
        await self._names.start()
        follower = asyncio.create_task(self._follow_pods(self._names))
        follower.add_done_callback(log_failure)
        stack.callback(follower.cancel)
        if self._config.discovery.source == "kubernetes":
            from forwarder.discovery.kube_client import KubeClient, access_by
            from forwarder.names.kube_services import KubeServices

            client = KubeClient(access_by(self._config.discovery.kubeconfig))
            stack.push_async_callback(client.close)
            services = KubeServices(client, partial(names.apply, "kubernetes"))
            following = asyncio.create_task(services.follow())
            following.add_done_callback(log_failure)
            stack.callback(following.cancel)

    async def _follow_pods(self, names: NameService) -> None:
        while True:
            await self._pods_changed.wait()
            self._pods_changed.clear()
            await self._name_pods(names)

    async def _name_pods(self, names: NameService) -> None:
        try:
            records = await asyncio.to_thread(read_records, self._config.node.state_dir)
        except StoreError as error:
            log.error("the names of pods are not up to date: %s", error)
        else:
            names.apply("pods", Replace(pods_of(records)))

    async def _ask_names(self, args: dict[str, Any]) -> dict[str, Any]:
        name = args.get("name")
        if not isinstance(name, str | None):
            raise VerbError("names takes name, a name or an address, or nothing")
        if self._names is None:
            raise VerbError("this node answers no names: set names.enabled = true and start podloom again")
        try:
            return await self._names.ask(name)
        except NamesError as error:
            raise VerbError(str(error)) from None

    # Reload

    def _hang_up(self) -> None:
        self._hang_ups.add(task := asyncio.create_task(self._reload_or_log()))
        task.add_done_callback(self._hang_ups.discard)

    async def _reload_or_log(self) -> None:
        try:
            await self._reload()
        except ConfigError as error:
            for fault in error.faults:
                log.error("not reloaded: %s", fault)
        except IdentityError as error:
            log.error("not reloaded: %s", error)

    async def _reload(self) -> list[str]:
        """Take over what may change while running; the keys that did. ConfigError or IdentityError, and no
        change at all, if anything is refused."""
        async with self._reloading:
            config = identify(load(self._path))
            if not config.node.prefixes:
                config = with_prefixes(config, self._config.node.prefixes)
            refuse(check(config.peers, config.local))
            changed = changed_keys(self._config, config)
            frozen = [key for key in changed if key not in CHANGEABLE]
            refuse(
                [
                    Fault(key, str(changed[key]), "cannot change while podloom runs: restart it")
                    for key in frozen
                ]
            )
            source = make_source(config)
            for name, on in asdict(config.offload).items():
                if f"offload.{name}" in changed:
                    self._dataplane.set_offload(name, on)
            self._config = config
            if self._names is not None and "services" in changed:
                self._names.apply("static", Replace(config.services))
            await self._unfollow()
            self._discovery.unannounced = None
            await self._follow(source)
        log.info("reloaded: %s", ", ".join(changed) or "nothing changed")
        return list(changed)

    # Control verbs

    async def _answer(self, request: Request) -> Any:
        match request.verb:
            case "status":
                return self._status()
            case "peers":
                return [self._peer(record) for record in self._records.values()]
            case "drops":
                return self._dataplane.drops()
            case "offload":
                return self._switch_offload(request.args)
            case "reload":
                try:
                    return {"changed": await self._reload()}
                except (ConfigError, IdentityError) as error:
                    raise VerbError(str(error)) from None
            case "names":
                return await self._ask_names(request.args)
            case "cni":
                return await self._call_cni(request.args)
        verbs = "status, peers, drops, offload, names, reload or cni"
        raise VerbError(f"verb = {request.verb!r}: must be {verbs}")

    def _switch_offload(self, args: dict[str, Any]) -> dict[str, Any]:
        name, on = args.get("name"), args.get("on")
        if not isinstance(name, str) or name not in ABOUT or not isinstance(on, bool):
            raise VerbError(f"offload takes name, one of {', '.join(ABOUT)}, and on, true or false")
        offload = self._dataplane.set_offload(name, on)
        log.info("offload %s is %s", name, "on" if offload.on else f"off: {offload.reason}")
        return asdict(offload)

    async def _call_cni(self, args: dict[str, Any]) -> dict[str, Any]:
        environment, stdin = args.get("env"), args.get("stdin")
        if not (
            isinstance(environment, dict)
            and all(isinstance(value, str) for value in environment.values())
            and isinstance(stdin, str)
        ):
            raise VerbError("cni takes env, an object of strings, and stdin, a string")
        loop = asyncio.get_running_loop()
        status, stdout = await loop.run_in_executor(self._workers, self._cni.handle, environment, stdin)
        if environment.get("CNI_COMMAND") in ("ADD", "DEL", "GC"):
            self._pods_changed.set()
        return {"exit": status, "stdout": stdout}

    def _status(self) -> dict[str, Any]:
        config, now = self._config, time.monotonic()
        return {
            "node_id": self._wiring.node_id,
            "version": podloom_version(),
            "uptime_seconds": round(now - self._started_at, 3),
            "endpoints": [str(endpoint) for endpoint in config.node.endpoints],
            "prefixes": [str(prefix) for prefix in self._wiring.usable_prefixes],
            "router_mac": format_mac(self._wiring.router_mac),
            "gateway_mac": format_mac(self._wiring.gateway_mac),
            "links": {"bridge": self._wiring.bridge, "tap": self._wiring.tap},
            "mtu": self._wiring.mtu_bytes,
            "encapsulation": config.tunnel.encapsulation,
            "vni": config.cluster.vni,
            "ports": {"geneve": config.tunnel.geneve_port, "vxlan": list(config.tunnel.vxlan_ports)},
            "peers": len(self._records),
            "discovery": self._discovery_status(now),
            "counters": self._dataplane.counters(),
            "offloads": {name: asdict(offload) for name, offload in self._dataplane.offloads().items()},
        }

    def _discovery_status(self, now: float) -> dict[str, Any]:
        state, age = self._discovery, None
        if state.stored_at is not None:
            age = max(0.0, time.time() - state.stored_at)
        elif state.updated_at is not None:
            age = now - state.updated_at
        return {
            "source": self._config.discovery.source,
            "stored": state.stored_at is not None,
            "age_seconds": None if age is None else round(age, 3),
            "fault": state.trouble or "; ".join(self._refusals) or None,
            "unannounced": state.unannounced,
        }

    def _peer(self, record: PeerRecord) -> dict[str, Any]:
        slot = self._slots[record.id]
        path = self._paths[slot]
        return {
            "id": record.id,
            "endpoint": str(path.endpoint),
            "endpoints": [str(endpoint) for endpoint in record.endpoints],
            "encapsulation": path.encapsulation,
            "port": path.port,
            "vni": path.vni,
            "mtu": path.mtu_bytes,
            "path_mtu": self._short_paths.get(record.id),
            "router_mac": format_mac(path.router_mac),
            "prefixes": [str(prefix) for prefix in record.prefixes],
            "counters": dict(self._dataplane.peer_counters(slot)),
        }


def make_source(config: Config, stored_prefixes: tuple[Network, ...] = ()) -> Source:
    """The configured source; `stored_prefixes` are those that this node had when it ran last. ConfigError if
    a file that [discovery] names cannot be used."""
    # The HTTP client is imported with the source that needs it: it is a fifth of a daemon's memory.
    match config.discovery.source:
        case "etcd":
            from forwarder.discovery.etcd import EtcdSource

            return EtcdSource(config, stored_prefixes)
        case "kubernetes":
            from forwarder.discovery.kubernetes import KubernetesSource

            return KubernetesSource(config, stored_prefixes)
        case _:
            return StaticSource(config)


def with_prefixes(config: Config, prefixes: tuple[Network, ...]) -> Config:
    return replace(config, node=replace(config.node, prefixes=prefixes))


def require_tunnel_segmentation(endpoints: tuple[Address, ...]) -> None:
    """UplinkError unless the underlay's devices cut tunnel superframes; where the kernel would have to,
    sending runs of datagrams is quicker."""
    for endpoint in endpoints:
        if not links.segments_tunnels(endpoint):
            raise UplinkError(f"the device of {endpoint} does not cut tunnels itself, and then it is slower")


def plan_wiring(config: Config) -> tuple[Wiring, dict[int, int]]:
    """The node's place in its kernel, and by the underlay's IP version the largest inner IP packet."""
    assert config.node.id is not None  # noqa: S101 (identified)
    assert config.node.router_mac is not None  # noqa: S101
    mtus: dict[int, int] = {
        endpoint.version: (config.tunnel.underlay_mtu_bytes or links.underlay_mtu_bytes(endpoint))
        - OVERHEAD_BYTES[endpoint.version]
        - (OPTION_BYTES if config.tunnel.remote_checksum else 0)
        for endpoint in config.node.endpoints
    }
    wiring = Wiring(
        node_id=config.node.id,
        bridge=config.links.bridge,
        tap=config.links.tap,
        tap_queue_frames=config.links.tap_queue_frames,
        mtu_bytes=min(mtus.values()),
        router_mac=config.node.router_mac,
        gateway_mac=gateway_mac(config.node.id),
        prefixes=config.node.prefixes,
        cluster_cidrs=config.cluster.cidrs,
        ipv6_available=links.ipv6_available(),
        bridge_netfilter=links.bridge_netfilter(),
    )
    if not wiring.usable_prefixes:
        raise StartError(
            "node.prefixes holds only IPv6 and this host has none: enable IPv6 or add an IPv4 prefix"
        )
    if wiring.usable_prefixes != wiring.prefixes:
        log.warning("this host has no IPv6: its pods get IPv4 only")
    if 6 in wiring.families and wiring.mtu_bytes < MIN_IPV6_MTU_BYTES:
        raise StartError(
            f"the underlay leaves pods an MTU of {wiring.mtu_bytes}, and IPv6 needs {MIN_IPV6_MTU_BYTES}: "
            "raise the underlay's MTU or use only IPv4 prefixes"
        )
    return wiring, mtus


def set_masquerade(config: Config, wiring: Wiring) -> None:
    if config.node.ip_masquerade:
        masquerade.ensure(wiring, config.tunnel.ports)
    else:
        masquerade.remove(wiring)


def data_plane_settings(config: Config, wiring: Wiring) -> Settings:
    return Settings(
        router_mac=wiring.router_mac,
        gateway_mac=wiring.gateway_mac,
        vni=config.cluster.vni,
        prefixes=wiring.usable_prefixes,
        endpoints=config.node.endpoints,
        listen=(
            (config.tunnel.geneve_port, "geneve"),
            *((port, "vxlan") for port in config.tunnel.vxlan_ports),
        ),
        vxlan_reserved_bits=config.tunnel.vxlan_reserved_bits,
        mtu_bytes=wiring.mtu_bytes,
        offloads={name: on for name, on in asdict(config.offload).items() if name != "uplink"},
    )


def node_network(config: Config, wiring: Wiring) -> NodeNetwork:
    return NodeNetwork(
        dns=dns_result(config, wiring),
        bridge=wiring.bridge,
        mtu=wiring.mtu_bytes,
        prefixes=wiring.usable_prefixes,
        gateways=tuple(gateway_of(prefix) for prefix in wiring.usable_prefixes),
        cluster_cidrs=wiring.cluster_cidrs,
        # One superframe of a pod is then one send: more segments would not fit into one datagram.
        gso_max_segs=MAX_DATAGRAM_BYTES // (wiring.mtu_bytes + INNER_HEADER_BYTES + OPTION_BYTES),
        tunnel_ports=config.tunnel.ports,
    )


def log_failure(task: asyncio.Task[None]) -> None:
    """What should not happen to names must not end the forwarding of packets."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("names are not followed any more: start podloom again", exc_info=error)


def names_settings(config: Config, wiring: Wiring) -> NamesSettings:
    clients = (*wiring.usable_prefixes, *config.node.endpoints, "127.0.0.0/8", "::1")
    return NamesSettings(
        domain=config.names.domain,
        addresses=dns_addresses(wiring),
        networks=tuple(map(str, config.cluster.cidrs)),
        clients=tuple(map(str, clients)),
        upstream=config.names.upstream,
        expected=("kubernetes",) if config.discovery.source == "kubernetes" else (),
        queries_per_second=config.names.queries_per_second,
        cache_bytes=config.names.cache_bytes,
    )


def dns_addresses(wiring: Wiring) -> tuple[str, ...]:
    return tuple(str(gateway_of(prefix)) for prefix in wiring.usable_prefixes)


def dns_result(config: Config, wiring: Wiring) -> dict[str, Any]:
    """What pods are told of the resolver, in the words of a CNI result; nothing where there is none."""
    if not config.names.enabled:
        return {}
    return {
        "nameservers": list(dns_addresses(wiring)),
        "search": [f"svc.{config.names.domain}", config.names.domain],
    }


def changed_keys(old: Config, new: Config) -> dict[str, Any]:
    """The keys whose values differ, with the new value."""
    changed: dict[str, Any] = {}
    for section in SECTIONS:
        before, after = getattr(old, section), getattr(new, section)
        for item in fields(after):
            if getattr(before, item.name) != getattr(after, item.name):
                changed[f"{section}.{item.name}"] = getattr(after, item.name)
    for name in ("peers", "services"):
        if getattr(old, name) != getattr(new, name):
            changed[name] = getattr(new, name)
    return changed


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", state, error.strerror)
