"""Open vSwitch's user-space datapath with a Geneve tunnel, on both hosts.

The pod is a port of the switch and OpenFlow rules route, which is the shortest way this switch has.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.compare.pods import Pair, ip, pod_address, run, start
from forwarder.demo.features import switch_off
from forwarder.demo.lab import VNI, Host, Lab

GENEVE_MTU = 1450
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")

# It reads frames from packet sockets, drops superframes and takes checksums for finished: so whatever feeds
# it must send as a plain card would, on every wire.
UNFINISHED = ("tx-checksum-ip-generic", "tx-udp-segmentation", "rx-gro")


@contextmanager
def join_by_openvswitch(lab: Lab, one: Host, other: Host) -> Iterator[Pair]:
    with ExitStack() as stack:
        pods, pids = [], []
        for here, there in ((one, other), (other, one)):
            pods.append(_add_pod(lab, here))
            switch_off(here.namespace, "eth0", *UNFINISHED)
            switch_off(pods[-1], "eth0", *UNFINISHED)
            switch = _Switch(here, lab.directory / f"ovs-{here.name}", stack)
            pids.append(switch.pid)
            _give_underlay(switch, here)
            _add_tunnel(switch, here, there)
        yield Pair(pods[0], pods[1], pod_address(other), tuple(pids))


class _Switch:
    """A database server and a switch as children of ours, with every file of theirs in one directory."""

    def __init__(self, host: Host, directory: Path, stack: ExitStack) -> None:
        self._namespace = host.namespace
        self._directory = directory
        self._remote = f"unix:{directory}/db.sock"
        # The programs find their sockets, pid files and logs by these.
        names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
        self._environment = os.environ | dict.fromkeys(names, str(directory))
        directory.mkdir()
        database = str(directory / "conf.db")
        self._run("ovsdb-tool", "create", database, str(SCHEMA))
        self._start(stack, "ovsdb-server", f"--remote=p{self._remote}", "--no-chdir", database)
        self.configure("--no-wait", "init")
        # No kernel datapath is to be looked for.
        self.pid = self._start(stack, "ovs-vswitchd", "--disable-system", self._remote)

    def configure(self, *words: str) -> None:
        """ovs-vsctl, which returns when the switch has done it."""
        self._run("ovs-vsctl", f"--db={self._remote}", "--retry", "--timeout=10", *words)

    def add_flows(self, name: str, flows: str) -> None:
        for flow in flows.split():
            self._run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", name, flow)

    def _run(self, *command: str) -> None:
        run(self._namespace, *command, environment=self._environment)

    def _start(self, stack: ExitStack, *command: str) -> int:
        log = stack.enter_context((self._directory / f"{command[0]}.log").open("wb"))
        process = start(
            stack,
            self._namespace,
            *command,
            env=self._environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        return process.pid


def _pod_mac(host: Host) -> str:
    return f"02:6f:76:00:00:{host.index:02x}"


def _add_pod(lab: Lab, host: Host) -> Path:
    pod = lab.add_namespace(f"p-{host.name}")
    ip(
        host.namespace,
        f"""link add pod0 mtu {GENEVE_MTU} type veth peer name eth0 mtu {GENEVE_MTU} netns {pod}
            link set pod0 up""",
    )
    gateway = host.gateways[0]
    ip(
        pod,
        f"""link set lo up
            link set eth0 address {_pod_mac(host)}
            address add {pod_address(host)}/32 dev eth0
            link set eth0 up
            route add {gateway} dev eth0
            route add default via {gateway}
            neighbour add {gateway} lladdr {host.router_mac} dev eth0 nud permanent""",
    )
    return pod


def _give_underlay(switch: _Switch, host: Host) -> None:
    """eth0 becomes a port of `br-wire`, and the host's address moves to that bridge's own device: the
    user-space datapath sends tunnel packets by the kernel's routes, but only over bridges of its own."""
    (eth0,) = json.loads(run(host.namespace, "ip", "-json", "link", "show", "eth0"))
    switch.configure(
        *("add-br", "br-wire", "--", "set", "bridge", "br-wire", "datapath_type=netdev"),
        *(f'other-config:hwaddr="{eth0["address"]}"', "--", "add-port", "br-wire", "eth0"),
    )
    ip(
        host.namespace,
        f"""address flush dev eth0
            link set br-wire up
            address add {host.underlay["ipv4"]}/24 dev br-wire""",
    )


def _add_tunnel(switch: _Switch, here: Host, there: Host) -> None:
    switch.configure(
        *("add-br", "br-pods", "--", "set", "bridge", "br-pods", "datapath_type=netdev"),
        *("--", "add-port", "br-pods", "pod0", "--", "set", "interface", "pod0", "ofport_request=1"),
        *("--", "add-port", "br-pods", "geneve0", "--", "set", "interface", "geneve0", "type=geneve"),
        *("ofport_request=2", f"options:remote_ip={there.underlay['ipv4']}", f"options:key={VNI}"),
        "options:csum=true",
    )
    rewrite = f"dec_ttl,mod_dl_src:{here.router_mac},mod_dl_dst:"
    to_peer = f"ip,nw_dst={there.prefixes[0]},actions={rewrite}{there.router_mac},2"
    to_pod = f"ip,nw_dst={pod_address(here)},actions={rewrite}{_pod_mac(here)},1"
    switch.add_flows(
        "br-pods",
        f"""priority=0,actions=drop
            in_port=1,dl_dst={here.router_mac},{to_peer}
            in_port=2,dl_dst={here.router_mac},{to_pod}""",
    )
