"""A cluster on one machine: nodes are network namespaces on one wire, each with its own real daemon, and
pods are namespaces attached by executing the CNI plugin as a container runtime does.

Here is how things are made and removed; what is then checked is not known here. Nothing is imported from
the product: `podloom` and `podloom-cni` are run as processes. The one rule: an undo is registered before
the thing is acquired, and undoing what is not there is no error.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from forwarder.demo import netns

_RUN = Path("/run")  # short: a unix socket's path has 107 bytes at most

UNDERLAY: dict[str, IPv4Network | IPv6Network] = {
    "ipv4": IPv4Network("192.0.2.0/24"),
    "ipv6": IPv6Network("2001:db8::/64"),
}
CLUSTER = (IPv4Network("10.71.0.0/16"), IPv6Network("fd71::/48"))
VNI = 71
MAX_HOSTS = 200  # what fits into UNDERLAY's IPv4 network, and into one byte of a prefix

START_SECONDS = 15.0
STOP_SECONDS = 5.0
PLUGIN_SECONDS = 30.0

_SOURCE = Path(__file__).resolve().parents[2]  # from where `-m forwarder` and `-m cni` are found
_IFA_F_NODAD = 0x02  # linux/if_addr.h


class LabError(Exception):
    """The lab could not be built, or a part of it did not do what it was told; the message says which."""


@dataclass(frozen=True)
class Host:
    """A namespace on the wire with an underlay address of each family. `index` is unique on the wire."""

    name: str
    index: int
    namespace: Path

    @property
    def underlay(self) -> dict[str, str]:
        return {family: str(network[self.index]) for family, network in UNDERLAY.items()}

    @property
    def prefixes(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The inner addresses behind this host, one prefix of each family out of CLUSTER."""
        return IPv4Network(f"10.71.{self.index}.0/24"), IPv6Network(f"fd71:0:0:{self.index:x}::/64")

    @property
    def gateways(self) -> tuple[str, ...]:
        return tuple(str(prefix[1]) for prefix in self.prefixes)

    @property
    def router_mac(self) -> str:
        return f"02:70:6c:00:00:{self.index:02x}"


@dataclass(frozen=True)
class Node(Host):
    """A host that runs our daemon, with its files in `directory`. `allotted` is filled in when the cluster
    has given it its prefixes."""

    directory: Path
    allotted: list[IPv4Network | IPv6Network] = field(default_factory=list, compare=False)

    @property
    def prefixes(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(self.allotted) or super().prefixes

    @property
    def config_file(self) -> Path:
        return self.directory / "podloom.toml"

    @property
    def peers_file(self) -> Path:
        return self.directory / "peers.toml"

    @property
    def log_file(self) -> Path:
        return self.directory / "daemon.log"

    @property
    def pid_file(self) -> Path:
        return self.directory / "pid"

    @property
    def control_socket(self) -> Path:
        return self.directory / "run" / "control.sock"


@dataclass(frozen=True)
class Pod:
    name: str
    node: Node
    namespace: Path
    ips: tuple[str, ...]


@dataclass(frozen=True)
class PeerRecord:
    """One entry of a peers file. `endpoints` are underlay addresses, `prefixes` what is behind them."""

    id: str
    endpoints: tuple[str, ...]
    encapsulation: str
    router_mac: str
    prefixes: tuple[str, ...]
    features: tuple[str, ...] = ()


class Lab:
    """A context manager: what it made is gone when it is left, unless `keep()` was called."""

    def __init__(
        self,
        name: str,
        *,
        encapsulation: str = "geneve",
        underlay: str = "ipv4",
        mtu: int = 1500,
        source: str = "static",
        extra_config: str = "",
    ):
        """`source` is "static", or "etcd" for nodes that find each other in one. `extra_config` is TOML put
        behind what every node's config file says."""
        self.name = name
        self.directory = directory_of(name)
        self.nodes: list[Node] = []
        self.pods: list[Pod] = []
        self._encapsulation = encapsulation
        self._underlay = underlay
        self._mtu = mtu
        self._source = source
        self._extra_config = extra_config
        self._hosts = 0
        self._foreign: list[PeerRecord] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: set[str] = set()
        self._undo = ExitStack()

    def __enter__(self) -> Lab:
        try:
            self._build_wire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build_wire(self) -> None:
        with deferred_interrupts():
            try:
                self.directory.mkdir(mode=0o700)
            except FileExistsError as error:
                raise LabError(f"{self.directory} is there already: another lab has this name") from error
            self._undo.callback(shutil.rmtree, self.directory)
        self._undo.callback(self._delete_namespaces)
        self.wire = self.add_namespace("wire")
        with netlink(self.wire) as ip:
            ip.link("add", ifname="wire", kind="bridge", mtu=self._mtu, br_mcast_snooping=0)
            ip.link("set", index=link_index(ip, "wire"), state="up")
        if self._source == "etcd":
            self.etcd = Etcd(self.wire, self.directory / "etcd")
            self._undo.callback(self.etcd.stop)
            with deferred_interrupts():
                self.etcd.start()
            self.etcd.wait_ready()
        self._undo.callback(self._stop_daemons)

    def __exit__(self, *_: object) -> None:
        with deferred_interrupts():
            self._undo.close()

    def keep(self) -> None:
        """Leave everything running; `remove(name)` ends it, from any process."""
        self._undo.pop_all()

    # Hosts and nodes

    def add_namespace(self, name: str) -> Path:
        """A bare namespace that goes with the lab."""
        full_name = f"{self.name}-{name}"
        try:
            with deferred_interrupts():
                path = netns.create(full_name)
                self._namespaces.add(full_name)
                return path
        except OSError as error:
            raise LabError(f"cannot make a network namespace (CAP_SYS_ADMIN is needed): {error}") from error

    def add_host(self, name: str) -> Host:
        """A namespace on the wire that does not run our daemon."""
        self._hosts += 1
        if self._hosts > MAX_HOSTS:
            raise LabError(f"a lab holds at most {MAX_HOSTS} hosts")
        host = Host(name, self._hosts, self.add_namespace(name))
        self._join_wire(host)
        return host

    def add_node(self) -> Node:
        """A host with a directory for its daemon, which `start()` starts."""
        host = self.add_host(f"n{self._hosts + 1}")
        node = Node(host.name, host.index, host.namespace, self.directory / host.name)
        node.directory.mkdir(mode=0o700)
        self.nodes.append(node)
        return node

    def add_foreign_peer(self, peer: PeerRecord) -> None:
        """A peer that is none of our nodes; known to the daemons that are started afterwards."""
        self._foreign.append(peer)

    def record(self, node: Node) -> PeerRecord:
        return PeerRecord(
            id=node.name,
            endpoints=(node.underlay[self._underlay],),
            encapsulation=self._encapsulation,
            router_mac=node.router_mac,
            prefixes=tuple(str(prefix) for prefix in node.prefixes),
            features=("health",),
        )

    def start(self) -> None:
        """Start the daemon of every node that has none, and return when all of them answer."""
        new = [node for node in self.nodes if node.name not in self._daemons]
        for node in new:
            self.launch(node)
        deadline = time.monotonic() + START_SECONDS
        for node in new:
            self.wait_ready(node, deadline)

    def launch(self, node: Node, config: str | None = None) -> None:
        """Start the node's daemon, which may take its time to answer. `config` is TOML to use instead of what
        the lab would write."""
        peers = [self.record(other) for other in self.nodes if other is not node] + self._foreign
        config = config or _config(node, self.record(node), self.etcd.url if self._source == "etcd" else None)
        node.config_file.write_text(f"{config}\n{self._extra_config}")
        node.peers_file.write_text(_peers(peers))
        with deferred_interrupts(), node.log_file.open("wb") as log:
            daemon = popen(
                node.namespace,
                [sys.executable, "-m", "forwarder", "up", "-c", str(node.config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self._daemons[node.name] = daemon
            node.pid_file.write_text(f"{daemon.pid}\n")

    def kill(self, node: Node) -> None:
        """End the node's daemon as a power cut does. The node and its pods leave the lab."""
        daemon = self._daemons.pop(node.name)
        daemon.kill()
        daemon.wait()
        self.nodes.remove(node)
        self.pods = [pod for pod in self.pods if pod.node is not node]

    def wait_ready(self, node: Node, deadline: float) -> float:
        """When the daemon first answered, on the monotonic clock: it opens its control socket last."""
        daemon = self._daemons[node.name]
        while not _answers(node.control_socket):
            if daemon.poll() is not None:
                said = _last_lines(node.log_file)
                raise LabError(f"the daemon on {node.name} ended with status {daemon.returncode}: {said}")
            if time.monotonic() > deadline:
                said = _last_lines(node.log_file)
                raise LabError(f"the daemon on {node.name} was not ready in time: {said}")
            time.sleep(0.01)
        answered_at = time.monotonic()
        if self._source == "etcd":
            node.allotted[:] = map(ip_network, self.ask(node, "status")["prefixes"])
        return answered_at

    def daemon(self, node: Node) -> subprocess.Popen[bytes]:
        return self._daemons[node.name]

    def ask(self, node: Node, *words: str) -> Any:
        """What `podloom WORDS --json` says on this node."""
        command = [sys.executable, "-m", "forwarder", *words, "-c", str(node.config_file), "--json"]
        status, output, errors = _communicate(
            popen(node.namespace, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), b"", START_SECONDS
        )
        if status != 0:
            raise LabError(f"podloom {' '.join(words)} on {node.name} failed: {errors.decode().strip()}")
        return json.loads(output)

    # Pods

    def add_pod(self, node: Node, name: str) -> Pod:
        """A new namespace, attached by the CNI plugin's ADD with the environment a runtime gives it."""
        namespace = self.add_namespace(name)
        with netlink(namespace) as ip:  # a runtime's loopback plugin does this
            ip.link("set", index=link_index(ip, "lo"), state="up")
        result = self._plugin(node, "ADD", name, namespace)
        ips = tuple(str(ip_interface(entry["address"]).ip) for entry in result["ips"])
        pod = Pod(name, node, namespace, ips)
        self.pods.append(pod)
        return pod

    def delete_pod(self, pod: Pod) -> None:
        """The CNI plugin's DEL, then the namespace, in a runtime's order."""
        self._plugin(pod.node, "DEL", pod.name, pod.namespace)
        with deferred_interrupts():
            netns.delete(pod.namespace.name)
            self._namespaces.remove(pod.namespace.name)
        self.pods.remove(pod)

    def _plugin(self, node: Node, verb: str, pod: str, namespace: Path) -> Any:
        configuration = {
            "cniVersion": "1.0.0",
            "name": "podloom",
            "type": "podloom-cni",
            "controlSocket": str(node.control_socket),
            "stateDir": str(node.directory / "state"),
        }
        environment = {
            "PATH": os.defpath,
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": f"{self.name}-{pod}",
            "CNI_NETNS": str(namespace),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(Path(sys.executable).parent),
        }
        process = popen(
            node.namespace,
            [sys.executable, "-m", "cni"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        status, output, errors = _communicate(process, json.dumps(configuration).encode(), PLUGIN_SECONDS)
        if status != 0:
            said = output.decode(errors="replace").strip() or errors.decode(errors="replace").strip()
            raise LabError(f"podloom-cni {verb} for {pod} on {node.name} ended with status {status}: {said}")
        return json.loads(output) if output.strip() else None

    # The parts

    def _delete_namespaces(self) -> None:
        while self._namespaces:
            netns.delete(self._namespaces.pop())

    def _join_wire(self, host: Host) -> None:
        with netlink(self.wire) as ip, host.namespace.open("rb") as there:
            eth0 = {"ifname": "eth0", "mtu": self._mtu, "net_ns_fd": there.fileno()}
            ip.link("add", ifname=host.name, kind="veth", mtu=self._mtu, peer=eth0)
            ip.link("set", index=link_index(ip, host.name), master=link_index(ip, "wire"), state="up")
        with netlink(host.namespace) as ip:
            ip.link("set", index=link_index(ip, "lo"), state="up")
            index = link_index(ip, "eth0")
            for family, network in UNDERLAY.items():
                # Without NODAD the IPv6 address could not be bound for a second.
                flags = {"flags": _IFA_F_NODAD} if family == "ipv6" else {}
                ip.addr(
                    "add", index=index, address=host.underlay[family], prefixlen=network.prefixlen, **flags
                )
            ip.link("set", index=index, state="up")

    def _stop_daemons(self) -> None:
        for daemon in self._daemons.values():
            daemon.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for daemon in self._daemons.values():
            try:
                daemon.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Etcd:
    """An etcd of one member on the wire, its files in a directory."""

    LEASE_SECONDS = 3
    HOLD_SECONDS = 9
    """A dead node's prefix is withheld so long, of which up to a third may have passed when it died."""
    PREFIXES = 64
    """IPv4 prefixes in CLUSTER: enough for a demo's nodes, and few, so that they can run out."""

    def __init__(self, namespace: Path, directory: Path) -> None:
        self._namespace = namespace
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._address = str(UNDERLAY["ipv4"][-2])
        self.url = self._client_url = f"http://{self._address}:2379"

    def start(self, *, hidden: bool = False) -> None:
        """Start it, or start it again on what it had; `wait_ready` waits until it answers. While it is hidden
        only `ctl` finds it."""
        self._client_url = "http://127.0.0.1:2379" if hidden else self.url
        for program in ("etcd", "etcdctl"):
            if shutil.which(program) is None:
                raise LabError(f"there is no {program}: install Debian's etcd-server and etcd-client")
        with netlink(self._namespace) as ip:
            ip.link("set", index=link_index(ip, "lo"), state="up")
            wire = link_index(ip, "wire")
            ip.addr("replace", index=wire, address=self._address, prefixlen=UNDERLAY["ipv4"].prefixlen)
        self._directory.mkdir(exist_ok=True)
        command = ["etcd", "--data-dir", str(self._directory / "data"), "--unsafe-no-fsync"]
        command += ["--listen-client-urls", self._client_url, "--advertise-client-urls", self._client_url]
        with (self._directory / "log").open("wb") as log:
            self._process = popen(
                self._namespace, command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        (self._directory / "pid").write_text(f"{self._process.pid}\n")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._ctl("endpoint", "health")[0] != 0:
            if time.monotonic() > deadline:
                said = _last_lines(self._directory / "log")
                raise LabError(f"etcd was not ready in {START_SECONDS:.0f} s: {said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """As a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def claims(self) -> dict[IPv4Network | IPv6Network, str]:
        """By prefix, the node that it is held for."""
        lines = self.ctl("get", "--prefix", "/podloom/prefixes/").split("\n")
        keys = (key.removeprefix("/podloom/prefixes/").replace("-", "/") for key in lines[:-1:2])
        return {ip_network(key): owner for key, owner in zip(keys, lines[1::2], strict=True)}

    def reserve(self, prefix: IPv4Network | IPv6Network) -> None:
        """Nobody takes a prefix that somebody else holds."""
        key = f"/podloom/prefixes/{str(prefix).replace('/', '-')}"
        self.ctl("put", key, "nobody")

    def ctl(self, *words: str) -> str:
        """What `etcdctl WORDS` says."""
        status, output, errors = self._ctl(*words)
        if status != 0:
            raise LabError(f"etcdctl {' '.join(words)} failed: {errors.decode().strip()}")
        return output.decode()

    def _ctl(self, *words: str) -> tuple[int, bytes, bytes]:
        process = popen(
            self._namespace,
            ["etcdctl", "--endpoints", self._client_url, *words],
            env={**os.environ, "ETCDCTL_API": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return _communicate(process, b"", START_SECONDS)


def directory_of(name: str) -> Path:
    """Where a lab of this name has its files."""
    return _RUN / f"podloom-{name}"


def kept() -> list[str]:
    """The names of the labs that are there."""
    return sorted(path.name.removeprefix("podloom-") for path in _RUN.glob("podloom-*") if path.is_dir())


def remove(name: str) -> None:
    """End a lab that was kept, or whose process was killed. LabError if there is none of that name."""
    if name not in kept():
        raise LabError(f"there is no demo named {name!r}; there are: {', '.join(kept()) or 'none'}")
    directory, namespaces = directory_of(name), netns.names(f"{name}-")
    with ExitStack() as stack:
        daemons = [_open_daemon(path, namespaces) for path in directory.glob("*/pid")]
        running = [daemon for daemon in daemons if daemon is not None]
        for daemon in running:
            stack.callback(os.close, daemon)
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for daemon in running:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([daemon], [], [], left)[0]:
                signal.pidfd_send_signal(daemon, signal.SIGKILL)
    for namespace in namespaces:
        netns.delete(namespace)
    shutil.rmtree(directory)


@contextmanager
def netlink(namespace: Path) -> Iterator[IPRoute]:
    """An rtnetlink socket inside a namespace. LabError if the kernel refuses what is asked of it."""
    try:
        with netns.inside(namespace), IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        raise LabError(f"the kernel refused to configure {namespace.name}: {error}") from error


def link_index(ip: IPRoute, name: str) -> int:
    """LabError if there is no such link."""
    found = list(ip.link_lookup(ifname=name))
    if not found:
        raise LabError(f"there is no link named {name}")
    return int(found[0])


def popen(namespace: Path, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process inside a namespace. It has a session of its own, so that a Ctrl-C at the terminal
    reaches only us and everything is ended in order."""
    with netns.inside(namespace):
        return subprocess.Popen(command, cwd=_SOURCE, start_new_session=True, **options)  # noqa: S603


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is left: what it acquires or undoes, it does whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    pending: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: pending.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


def _communicate(process: subprocess.Popen[bytes], data: bytes, seconds: float) -> tuple[int, bytes, bytes]:
    with process:
        try:
            output, errors = process.communicate(data or None, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise LabError(f"{' '.join(map(str, process.args))} did not end in {seconds:.0f} s") from error  # type: ignore[arg-type]
        except BaseException:
            process.kill()
            raise
    return process.returncode, output, errors


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _open_daemon(path: Path, namespaces: Iterable[str]) -> int | None:
    """A pidfd, if the process of that number is still the one we started: it is in our namespaces."""
    try:
        pid = int(path.read_text())
        daemon = os.pidfd_open(pid)
    except (ValueError, ProcessLookupError):
        return None
    ours = {(netns.DIRECTORY / name).stat().st_ino for name in namespaces}
    with suppress(FileNotFoundError):
        if Path(f"/proc/{pid}/ns/net").stat().st_ino in ours:
            return daemon
    os.close(daemon)
    return None


def _last_lines(path: Path, count: int = 8) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()[-count:]
    return "\n".join(lines) or "it wrote nothing"


def _config(node: Node, own: PeerRecord, etcd_url: str | None) -> str:
    node_table: dict[str, Any] = {
        "id": own.id,
        "router_mac": own.router_mac,
        "endpoints": own.endpoints,
        "state_dir": str(node.directory / "state"),
        "run_dir": str(node.control_socket.parent),
        # There is nothing outside the lab's cluster, so it need not have nftables.
        "ip_masquerade": False,
    }
    if etcd_url is None:
        node_table["prefixes"] = own.prefixes
        discovery: dict[str, Any] = {"source": "static", "file": str(node.peers_file)}
    else:
        discovery = {
            "source": "etcd",
            "urls": [etcd_url],
            "lease_seconds": Etcd.LEASE_SECONDS,
            "hold_seconds": Etcd.HOLD_SECONDS,
            "prefix_length_ipv4": CLUSTER[0].prefixlen + (Etcd.PREFIXES - 1).bit_length(),
        }
    return _toml(
        {
            "cluster": {"cidrs": [str(network) for network in CLUSTER], "vni": VNI},
            "node": node_table,
            "tunnel": {"encapsulation": own.encapsulation},
            "discovery": discovery,
        }
    )


def _peers(peers: Iterable[PeerRecord]) -> str:
    return "\n".join(
        "[[peer]]\n"
        + _pairs(
            {
                "id": peer.id,
                "endpoints": peer.endpoints,
                "encapsulation": peer.encapsulation,
                "router_mac": peer.router_mac,
                "prefixes": peer.prefixes,
                "features": peer.features,
            }
        )
        for peer in peers
    )


def _toml(tables: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"[{name}]\n{_pairs(values)}" for name, values in tables.items())


def _pairs(values: dict[str, Any]) -> str:
    # Strings, integers and lists of strings are spelt alike in JSON and TOML.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
