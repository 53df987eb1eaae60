"""The composition root: what `podloom up` starts, in which order, and how it ends.

Above the line only configuration is read; below it the machine is touched, and every touch registers its
own undoing first thing after it succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import uvloop

from cni.service import CniService, NodeNetwork, read_records
from cni.store import Record, StoreError
from forwarder import links, masquerade
from forwarder.addresses import Address, Network, format_mac, gateway_of
from forwarder.bgp import Speaker
from forwarder.config import Config, load
from forwarder.control.messages import Request
from forwarder.control.server import ControlServer, VerbError
from forwarder.dataplane import DataPlane, DataPlaneError
from forwarder.direct import Direct
from forwarder.discovery import Source, stored
from forwarder.discovery.static import StaticSource
from forwarder.faults import ConfigError, Fault
from forwarder.finder import Finder, read_key
from forwarder.follower import Follower
from forwarder.kernel_routes import RouteKeeper
from forwarder.legs import Way
from forwarder.links import LinkError
from forwarder.masquerade import MasqueradeError
from forwarder.names.service import NamesError
from forwarder.neighbourhood import Neighbourhood
from forwarder.node import IdentityError, identify
from forwarder.node_names import NodeNames
from forwarder.offloads import ABOUT
from forwarder.peers import OPTION_BYTES, PeerRecord, check
from forwarder.plan import (
    CHANGEABLE,
    UNDERLAY_KEYS,
    changed_keys,
    data_plane_settings,
    device_mtus,
    direct_settings,
    dns_result,
    inner_mtus,
    names_settings,
    plan_wiring,
    with_endpoints,
    with_prefixes,
)
from forwarder.probing import Probing
from forwarder.process import StartError, notify, require_privileges, run_directory
from forwarder.reconcile import Wiring
from forwarder.roaming import Roaming
from forwarder.underlay import AUTO, Host, UnderlayError
from forwarder.upkeep import Upkeep
from forwarder.uplink import UplinkError, open_uplink
from forwarder.version import podloom_version

log = logging.getLogger("podloom")

MAX_DATAGRAM_BYTES: Final = 65507
"""The largest UDP payload over IPv4, which bounds a run of datagrams too (UDP_SEGMENT)."""

INNER_HEADER_BYTES: Final = 8 + 14
"""Of every datagram: the tunnel header and the inner Ethernet header."""

CNI_WORKERS: Final = 8

FAILURES: Final = (
    StartError,
    LinkError,
    UnderlayError,
    MasqueradeError,
    DataPlaneError,
    IdentityError,
    NamesError,
)
"""What ends a daemon with a sentence that says what to do."""

SWITCH_SECONDS: Final = 0.001
"""How long a CNI call may keep the interpreter while a packet waits. The default is five times that, on
top of each round trip whose batch needs the interpreter once; shorter only adds switches."""


def run(path: Path) -> int:
    """Run until told to stop. Exit status: 0 stopped, 1 failed, 2 the configuration is refused."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="podloom: %(levelname)s: %(message)s")
    try:
        config = load(path)
        require_privileges()
        # ---- Above this line only configuration is read; below it the machine is touched. ----
        with run_directory(config.node.run_dir):
            config = with_endpoints(identify(config), observe(config))
            refuse(check(config.peers, config.local))
            daemon = Daemon(path, config)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(daemon.run())
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s: %s", path, fault)
        return 2
    except FAILURES as error:
        log.error("%s", error)
        return 1
    return 0


def observe(config: Config) -> Host:
    """What of the host decides where this node is."""
    return links.observe(routes=config.node.device == AUTO)


def refuse(faults: list[Fault]) -> None:
    if faults:
        raise ConfigError(faults)


class Daemon:
    """One node's control plane. `config` is identified and placed: id, router MAC and endpoints are filled
    in."""

    def __init__(self, path: Path, config: Config) -> None:
        self._path = path
        self._config = config
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        self._reloading = asyncio.Lock()
        self._hang_ups: set[asyncio.Task[None]] = set()
        self._names: NodeNames | None = None
        self._direct: Direct | None = None
        self._speaker: Speaker | None = None

    async def run(self) -> None:
        """Start, forward until stopped, and end as the configuration says."""
        # The data path needs the interpreter once a batch, between which worker threads hold it.
        sys.setswitchinterval(SWITCH_SECONDS)
        async with AsyncExitStack() as stack:
            self._listen_to_signals()
            source = await self._settle()
            if source is None:
                return
            host = await asyncio.to_thread(observe, self._config)
            devices = device_mtus(self._config, host)
            mtus = inner_mtus(self._config, devices)
            wiring = await asyncio.to_thread(plan_wiring, self._config, host, mtus)
            tap = await asyncio.to_thread(links.open_tap, wiring.tap, wiring.node_id, wiring.router_mac)
            stack.push_async_callback(self._remove_links, wiring)
            stack.callback(tap.close)
            # Sockets before links: a port in use is the likeliest failure, and then nothing was made yet.
            self._dataplane = DataPlane(data_plane_settings(self._config, wiring), tap.fileno(), self._mend)
            stack.callback(self._dataplane.close)
            await asyncio.to_thread(set_masquerade, self._config, wiring)
            for operation in await asyncio.to_thread(links.ensure, wiring):
                log.debug("%s", operation)
            await self._open_uplink(stack, wiring)
            self._cni = CniService(self._network(wiring), self._config.node.state_dir)
            stack.callback(self._cni.close)
            await self._meet_peers(stack, source, wiring, mtus)
            self._upkeep = Upkeep(
                self._config,
                wiring,
                devices,
                self._dataplane,
                self._neighbourhood,
                moved=self._relocate,
                attach=self._attach_pods,
                on_failure=self._fail,
            )
            stack.callback(self._upkeep.close)
            self._dataplane.start()
            self._workers = ThreadPoolExecutor(CNI_WORKERS, thread_name_prefix="cni")
            stack.callback(self._workers.shutdown)
            self._status_worker = ThreadPoolExecutor(1, thread_name_prefix="cni-status")
            stack.callback(self._status_worker.shutdown)
            for work in (self._neighbourhood.watch_paths(), self._probing.run(), self._upkeep.run()):
                self._beside(stack, work)
            if self._finder is not None:
                self._beside(stack, self._finder.run())
            if self._direct is not None:
                self._beside(stack, self._direct.run())
            self._tell_bird(stack, wiring)
            if self._config.names.enabled:
                self._names = NodeNames(names_settings(self._config, wiring), self._read_pods)
                stack.push_async_callback(self._names.close)
                await self._names.start(self._config)
            server = ControlServer(self._config.socket_path, self._answer)
            await server.open()
            stack.push_async_callback(server.close)
            stack.callback(notify, "STOPPING=1")
            notify("READY=1")
            log.info(
                "READY: node %s forwards for %s, %d peers, MTU %d, control socket %s",
                wiring.node_id,
                ", ".join(map(str, wiring.usable_prefixes)),
                len(self._neighbourhood.records),
                wiring.mtu_bytes,
                self._config.socket_path,
            )
            await self._stopping.wait()
            log.info("stopping")
        if self._failure is not None:
            raise self._failure

    async def _settle(self) -> Source | None:
        """The source, once this node has its prefixes by it; None if we are told to stop before."""
        self._kept = stored.read(self._config.node.state_dir, self._config.discovery.source)
        source = make_source(self._config, self._kept.prefixes if self._kept else ())
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

    async def _open_uplink(self, stack: AsyncExitStack, wiring: Wiring) -> None:
        """Use the uplink if it is wanted and passes its test; traffic goes without it otherwise."""
        choice, endpoints = self._config.offload.uplink, self._config.node.endpoints
        if choice == "off":
            return
        try:
            if choice == "auto":
                await asyncio.to_thread(require_tunnel_segmentation, endpoints)
            uplink = await asyncio.to_thread(
                open_uplink, self._config.links.uplink, wiring.node_id, endpoints
            )
        except UplinkError as error:
            log.info("no uplink: %s", error)
            self._dataplane.forgo_uplink(str(error))
            return
        stack.callback(uplink.close)
        self._dataplane.take_uplink(uplink)

    async def _meet_peers(
        self, stack: AsyncExitStack, source: Source, wiring: Wiring, mtus: Mapping[int, int]
    ) -> None:
        """Follow the source, from its first word or from the peers of last time on."""
        unsaved, keeper = asyncio.Event(), RouteKeeper(wiring)
        health = self._config.health
        self._probing = Probing(
            self._dataplane,
            interval_seconds=health.interval_seconds,
            detect_multiplier=health.detect_multiplier,
        )
        roaming = make_roaming(self._config)

        def changed() -> None:
            unsaved.set()
            if self._direct is not None:
                self._direct.look_soon()

        self._neighbourhood = Neighbourhood(
            self._config.local,
            self._config.features,
            mtus,
            wiring,
            self._dataplane,
            self._probing,
            keeper,
            roaming,
            changed=changed,
        )
        self._finder = Finder(roaming, self._dataplane, self._neighbourhood) if roaming else None
        settings = direct_settings(self._config, wiring)
        if settings is not None:
            self._direct = Direct(settings, self._neighbourhood.records, keeper, self._probing.is_down)
        self._follower = Follower(
            self._config, self._neighbourhood, unsaved, self._fail, on_fence=self._cni.fence
        )
        self._follower.recall(self._kept)
        stack.push_async_callback(self._follower.save)
        await self._follower.follow(source, self._config)
        stack.push_async_callback(self._follower.unfollow)
        stack.enter_context(self._follower.saving())

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._stopping.set()

    def _tell_bird(self, stack: AsyncExitStack, wiring: Wiring) -> None:
        bgp = self._config.bgp
        if bgp.include is not None:
            self._speaker = Speaker(bgp.include, bgp.control_socket, wiring.bridge)
            stack.push_async_callback(self._withdraw, self._speaker)
            self._beside(stack, self._speaker.announce(wiring.usable_prefixes))

    async def _withdraw(self, speaker: Speaker) -> None:
        if not self._config.links.keep_on_exit:
            await speaker.withdraw()

    def _beside(self, stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
        """Have it done until the end; if it fails, that is the end."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._fail_with)
        stack.callback(task.cancel)

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _remove_links(self, wiring: Wiring) -> None:
        if not self._config.links.keep_on_exit:
            await asyncio.to_thread(links.remove, wiring)
            await asyncio.to_thread(masquerade.remove, wiring)

    # Changes of the host

    def _mend(self, error: Exception) -> None:
        self._upkeep.mend(error)

    def _relocate(self, config: Config) -> None:
        self._config = replace(self._config, node=replace(self._config.node, endpoints=config.node.endpoints))
        self._follower.relocate(self._config)
        if self._direct is not None:
            self._direct.move(config.node.endpoints)
        if self._names is not None:
            self._names.relocate(self._config)

    def _attach_pods(self, wiring: Wiring) -> None:
        """Bring the pods there are, and those to come, to the bridge as it is now."""
        if self._direct is not None:
            self._direct.resize(wiring.mtu_bytes)
        for fault in self._cni.reattach(self._network(wiring)):
            log.error("%s", fault)

    def _network(self, wiring: Wiring) -> NodeNetwork:
        return node_network(self._config, wiring, uplink=self._dataplane.offloads()["uplink"].on)

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
        except (IdentityError, LinkError, UnderlayError) as error:
            log.error("not reloaded: %s", error)

    async def _reload(self) -> list[str]:
        """Take over what may change while running; the keys that did. ConfigError, IdentityError, LinkError
        or UnderlayError, and no change at all, if anything is refused."""
        async with self._reloading:
            config = identify(load(self._path))
            if not config.node.prefixes:
                config = with_prefixes(config, self._config.node.prefixes)
            if config.node.device:
                host = await asyncio.to_thread(observe, config)
                config = with_endpoints(config, host, self._config.node.endpoints)
            refuse(check(config.peers, config.local))
            changed = changed_keys(self._config, config)
            frozen = [key for key in changed if key not in CHANGEABLE]
            refuse(
                [
                    Fault(key, str(changed[key]), "cannot change while podloom runs: restart it")
                    for key in frozen
                ]
            )
            follow_anew = not changed or bool(changed.keys() - UNDERLAY_KEYS)
            source = make_source(config) if follow_anew else None
            for name, on in asdict(config.offload).items():
                if f"offload.{name}" in changed:
                    self._dataplane.set_offload(name, on)
            self._config = config
            if self._names is not None and "services" in changed:
                self._names.set_services(config.services)
            if self._names is not None and any(key.startswith("discovery.") for key in changed):
                await self._names.follow(config)
            if source is not None:
                await self._follower.unfollow()
                await self._follower.follow(source, config)
            await self._upkeep.reconfigure(config)
        log.info("reloaded: %s", ", ".join(changed) or "nothing changed")
        return list(changed)

    # Control verbs

    async def _answer(self, request: Request) -> Any:
        match request.verb:
            case "status":
                return self._status()
            case "peers":
                return self._neighbourhood.describe(self._way)
            case "drops":
                return self._drops()
            case "offload":
                return self._switch_offload(request.args)
            case "reload":
                try:
                    return {"changed": await self._reload()}
                except (ConfigError, IdentityError, LinkError, UnderlayError) as error:
                    raise VerbError(str(error)) from None
            case "names":
                return await self._ask_names(request.args)
            case "cni":
                return await self._call_cni(request.args)
        verbs = "status, peers, drops, offload, names, reload or cni"
        raise VerbError(f"verb = {request.verb!r}: must be {verbs}")

    def _way(self, record: PeerRecord, prefix: Network) -> Way:
        if self._direct is None:
            return Way("tunnel", 'underlay.direct is "off" here')
        return self._direct.way(record, prefix)

    def _drops(self) -> dict[str, dict[str, int]]:
        drops = self._dataplane.drops()
        return drops if self._direct is None else {**drops, "bfd": dict(self._direct.drops)}

    def _switch_offload(self, args: dict[str, Any]) -> dict[str, Any]:
        name, on = args.get("name"), args.get("on")
        if not isinstance(name, str) or name not in ABOUT or not isinstance(on, bool):
            raise VerbError(f"offload takes name, one of {', '.join(ABOUT)}, and on, true or false")
        offload = self._dataplane.set_offload(name, on)
        log.info("offload %s is %s", name, "on" if offload.on else f"off: {offload.reason}")
        return asdict(offload)

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

    async def _call_cni(self, args: dict[str, Any]) -> dict[str, Any]:
        environment, stdin, began_at = args.get("env"), args.get("stdin"), args.get("began_at")
        if not (
            isinstance(environment, dict)
            and all(isinstance(value, str) for value in environment.values())
            and isinstance(stdin, str)
            and isinstance(began_at, float | None)
        ):
            raise VerbError(
                "cni takes env, an object of strings, stdin, a string, and began_at, seconds since the boot"
            )
        # A runtime asks STATUS every few seconds, and takes a node that is slow to answer for a broken one.
        workers = self._status_worker if environment.get("CNI_COMMAND") == "STATUS" else self._workers
        status, stdout = await asyncio.get_running_loop().run_in_executor(
            workers, self._cni.handle, environment, stdin, began_at
        )
        if self._names is not None and environment.get("CNI_COMMAND") in ("ADD", "DEL", "GC"):
            self._names.note_pods()
        return {"exit": status, "stdout": stdout}

    def _read_pods(self) -> list[Record]:
        try:
            return read_records(self._config.node.state_dir)
        except StoreError as error:
            raise NamesError(str(error)) from None

    def _status(self) -> dict[str, Any]:
        config, wiring = self._config, self._upkeep.wiring
        return {
            "node_id": wiring.node_id,
            "fault": self._upkeep.fault,
            "version": podloom_version(),
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "endpoints": [str(endpoint) for endpoint in self._dataplane.endpoints],
            "prefixes": [str(prefix) for prefix in wiring.usable_prefixes],
            "router_mac": format_mac(wiring.router_mac),
            "gateway_mac": format_mac(wiring.gateway_mac),
            "links": {"bridge": wiring.bridge, "tap": wiring.tap},
            "mtu": wiring.mtu_bytes,
            "encapsulation": config.tunnel.encapsulation,
            "vni": config.cluster.vni,
            "ports": {"geneve": config.tunnel.geneve_port, "vxlan": list(config.tunnel.vxlan_ports)},
            "peers": len(self._neighbourhood.records),
            "discovery": self._follower.describe(),
            "bgp": None if self._speaker is None else {"fault": self._speaker.fault},
            "counters": self._dataplane.counters(),
            "offloads": {name: asdict(offload) for name, offload in self._dataplane.offloads().items()},
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


def make_roaming(config: Config) -> Roaming | None:
    """StartError if it is wanted and the key cannot be used."""
    if not config.health.roaming:
        return None
    assert config.health.key_file is not None  # noqa: S101 (checked together)
    assert config.node.id is not None  # noqa: S101 (identified)
    return Roaming(config.node.id, read_key(config.health.key_file), os.urandom)


def require_tunnel_segmentation(endpoints: tuple[Address, ...]) -> None:
    """UplinkError unless the underlay's devices cut tunnel superframes; where the kernel would have to,
    sending runs of datagrams is quicker."""
    for endpoint in endpoints:
        if not links.segments_tunnels(endpoint):
            raise UplinkError(f"the device of {endpoint} does not cut tunnels itself, and then it is slower")


def set_masquerade(config: Config, wiring: Wiring) -> None:
    if config.node.ip_masquerade:
        masquerade.ensure(wiring, config.tunnel.ports)
    else:
        masquerade.remove(wiring)


def node_network(config: Config, wiring: Wiring, *, uplink: bool) -> NodeNetwork:
    # One superframe of a pod is then one send: more segments would not fit into one datagram. The uplink
    # takes superframes of any length.
    gso_max_segs = MAX_DATAGRAM_BYTES // (wiring.mtu_bytes + INNER_HEADER_BYTES + OPTION_BYTES)
    return NodeNetwork(
        dns=dns_result(config, wiring),
        bridge=wiring.bridge,
        mtu=wiring.mtu_bytes,
        prefixes=wiring.usable_prefixes,
        gateways=tuple(gateway_of(prefix) for prefix in wiring.usable_prefixes),
        cluster_cidrs=wiring.cluster_cidrs,
        gso_max_segs=None if uplink else gso_max_segs,
        tunnel_ports=config.tunnel.ports,
        tap=wiring.tap,
        serves_names=config.names.enabled,
    )
