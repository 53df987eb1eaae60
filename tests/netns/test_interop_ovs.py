"""Our node and Open vSwitch's user-space datapath are Geneve peers."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from forwarder.demo.features import switch_off
from forwarder.demo.lab import UNDERLAY, VNI, Host, Node, PeerRecord, link_index, netlink, popen
from forwarder.demo.probes import Station, ping
from tests.netns.foreign import INNER_MTU, NO_CHECKSUM_OFFLOAD, NODAD, add_pod_behind, assert_they_talk
from tests.netns.labs import new_lab

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tun")]

SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
PROGRAMS = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovs-ofctl")
ROUTER_MAC, POD_MAC = "02:6f:76:00:00:01", "02:6f:76:00:00:02"
NUD_PERMANENT = 0x80
STOP_SECONDS = 5.0


class OpenVSwitch:
    """Its database server and its switch as children of ours, with every file in one directory."""

    def __init__(self, namespace: Path, directory: Path) -> None:
        self._namespace = namespace
        self._directory = directory
        self._database = f"unix:{directory}/db.sock"
        # The programs find their sockets, pid files and logs by these.
        names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
        self._environment = os.environ | dict.fromkeys(names, str(directory))

    @contextmanager
    def running(self) -> Iterator[None]:
        self._directory.mkdir()
        database = str(self._directory / "conf.db")
        self._run("ovsdb-tool", "create", database, str(SCHEMA))
        with ExitStack() as stack:
            self._start(stack, "ovsdb-server", f"--remote=p{self._database}", "--no-chdir", database)
            self.configure("--no-wait", "init")
            # No kernel datapath is to be looked for. It pins no memory unless told to.
            self._start(stack, "ovs-vswitchd", "--disable-system", self._database)
            yield

    def configure(self, *words: str) -> None:
        """ovs-vsctl, which returns when the switch has done it."""
        self._run("ovs-vsctl", f"--db={self._database}", "--retry", "--timeout=10", *words)

    def add_flows(self, bridge: str, *flows: str) -> None:
        for flow in flows:
            self._run("ovs-ofctl", "-O", "OpenFlow13", "add-flow", bridge, flow)

    def _start(self, stack: ExitStack, *command: str) -> None:
        log = stack.enter_context((self._directory / f"{command[0]}.out").open("wb"))
        process = popen(
            self._namespace, list(command), env=self._environment, stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_stop, process)

    def _run(self, *command: str) -> None:
        process = popen(
            self._namespace,
            list(command),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        with process:
            output, _ = process.communicate(timeout=30)
        said = [output, *(log.read_bytes() for log in self._directory.glob("*.out"))]
        assert process.returncode == 0, f"{' '.join(command)}: {b' '.join(said).decode()}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.parametrize("underlay", ["ipv4", "ipv6"])
def test_open_vswitch_geneve(underlay: str) -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or not SCHEMA.exists():
        pytest.skip(
            f"Debian package openvswitch-switch is absent ({', '.join(missing)}): "
            "Geneve with Open vSwitch is NOT tested in this run"
        )
    with new_lab("geneve", underlay) as lab:
        node, host = lab.add_node(), lab.add_host("ovs")
        theirs = add_pod_behind(lab, host, INNER_MTU[underlay])
        # Open vSwitch 3.1 reads frames from packet sockets and takes their checksums for finished. A veth's
        # are not, and may be superframes: so both devices that feed it send as a card would.
        switch_off(theirs.namespace, "eth0", *NO_CHECKSUM_OFFLOAD)
        switch_off(node.namespace, "eth0", *NO_CHECKSUM_OFFLOAD)

        switch = OpenVSwitch(host.namespace, lab.directory / "ovs")
        with switch.running():
            give_underlay_to_switch(switch, host)
            add_tunnel(switch, node, host, theirs, underlay)
            lab.add_foreign_peer(
                PeerRecord(
                    id="ovs",
                    endpoints=(host.underlay[underlay],),
                    encapsulation="geneve",
                    router_mac=ROUTER_MAC,
                    prefixes=tuple(str(prefix) for prefix in host.prefixes),
                )
            )
            lab.start()
            pod = lab.add_pod(node, "p1")
            ours = Station(pod.name, pod.namespace, pod.ips)
            wait_for_neighbour(ours, theirs)
            assert_they_talk(lab, node, ours, theirs)


def give_underlay_to_switch(switch: OpenVSwitch, host: Host) -> None:
    """eth0 becomes a port of `br-wire`, and the host's addresses move to that bridge's own device: the
    user-space datapath sends tunnel packets by the kernel's routes, but only over bridges of its own."""
    with netlink(host.namespace) as ip:
        index = link_index(ip, "eth0")
        (eth0,) = ip.get_links(index)
        ip.flush_addr(index=index)
    mac = eth0.get_attr("IFLA_ADDRESS")
    switch.configure("add-br", "br-wire", "--", "set", "bridge", "br-wire", "datapath_type=netdev")
    switch.configure("set", "bridge", "br-wire", f"other-config:hwaddr={mac}")
    switch.configure("add-port", "br-wire", "eth0")
    with netlink(host.namespace) as ip:
        index = link_index(ip, "br-wire")
        ip.link("set", index=index, state="up")
        for family, network in UNDERLAY.items():
            options = NODAD if family == "ipv6" else {}
            address = host.underlay[family]
            ip.addr("add", index=index, address=address, prefixlen=network.prefixlen, **options)


def add_tunnel(switch: OpenVSwitch, node: Node, host: Host, theirs: Station, underlay: str) -> None:
    """`br-pods` with the pod and a Geneve port, and flows that do a router's work between them."""
    switch.configure("add-br", "br-pods", "--", "set", "bridge", "br-pods", "datapath_type=netdev")
    switch.configure("add-port", "br-pods", "pod0", "--", "set", "interface", "pod0", "ofport_request=1")
    tunnel = f"options:remote_ip={node.underlay[underlay]} options:key={VNI} options:csum=true"
    switch.configure(
        *("add-port", "br-pods", "geneve0", "--", "set", "interface", "geneve0", "type=geneve"),
        *("ofport_request=2", *tunnel.split()),
    )
    flows = ["priority=0,actions=drop"]
    for there, here, theirs_ip in zip(node.prefixes, host.prefixes, theirs.ips, strict=True):
        family, field = ("ip", "nw_dst") if here.version == 4 else ("ipv6", "ipv6_dst")
        rewrite = f"dec_ttl,mod_dl_src:{ROUTER_MAC},mod_dl_dst:"
        flows += [
            f"in_port=1,dl_dst={ROUTER_MAC},{family},{field}={there},actions={rewrite}{node.router_mac},2",
            f"in_port=2,dl_dst={ROUTER_MAC},{family},{field}={theirs_ip},actions={rewrite}{POD_MAC},1",
        ]
    switch.add_flows("br-pods", *flows)
    with netlink(theirs.namespace) as ip:
        index = link_index(ip, "eth0")
        ip.link("set", index=index, address=POD_MAC)
        for gateway in host.gateways:
            ip.neigh("replace", dst=gateway, lladdr=ROUTER_MAC, ifindex=index, state=NUD_PERMANENT)


def wait_for_neighbour(ours: Station, theirs: Station) -> None:
    """The user-space datapath drops what it would send to a host whose MAC it does not know yet, and asks."""
    deadline = time.monotonic() + 10
    while ping([(ours, theirs)], seconds=0.2).lost and time.monotonic() < deadline:
        pass
