"""A real daemon in a namespace: how it starts, follows, reloads, refuses and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from forwarder.addresses import derive_mac, format_mac
from forwarder.daemon import CNI_WORKERS
from tests.netns.nodes import Node, toml, until
from tests.netns_tools import Namespace

pytestmark = pytest.mark.root

Pair = tuple[Node, Node]

PEER2 = toml(
    {"[peer]": {"id": "n2", "endpoints": ["192.0.2.2"], "prefixes": ["10.42.2.0/24", "fd42:0:0:2::/64"]}}
)
PEER3 = toml({"[peer]": {"id": "n3", "endpoints": ["192.0.2.3"], "prefixes": ["10.42.3.0/24"]}})

NO_CAPABILITIES = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")

ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], 7))
    print("bound", flush=True)
    while True:
        data, sender = server.recvfrom(65536)
        server.sendto(data, sender)
"""

ASK = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as client:
    client.settimeout(float(sys.argv[2]))
    client.connect((sys.argv[1], 7))
    client.send(b"hello")
    print(client.recv(100).decode(), client.getsockname()[0])
"""


class Echo:
    """A UDP echo server on an address of a namespace, as a context manager."""

    def __init__(self, namespace: Namespace, address: str) -> None:
        self._command = namespace.command([sys.executable, "-c", ECHO, address])

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "bound\n"

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def echoes(namespace: Namespace, address: str, *, seconds: float = 5.0) -> str | None:
    """The address we spoke from, as the host chose it, or None if nothing came back."""
    done = subprocess.run(
        namespace.command([sys.executable, "-c", ASK, address, str(seconds)]),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()[1] if done.returncode == 0 else None


def peer_ids(node: Node) -> list[str]:
    return [peer["id"] for peer in node.ask("peers")]


@pytest.mark.parametrize("encapsulation", ["geneve", "vxlan"])
@pytest.mark.parametrize("underlay", ["192.0.2.{}", "2001:db8::{}"], ids=["IPv4 wire", "IPv6 wire"])
def test_hosts_of_two_nodes_talk(pair: Pair, encapsulation: str, underlay: str) -> None:
    one, two = pair
    for node, other in (one, two), (two, one):
        node.tables["node"]["endpoints"] = [underlay.format(node.number)]
        other.tables["node"]["endpoints"] = [underlay.format(other.number)]
        node.tables["tunnel"] = {"encapsulation": encapsulation}
        node.write_peers(other.record())
    for node in pair:
        node.start()
    with Echo(two.namespace, "10.42.2.1"):
        assert echoes(one.namespace, "10.42.2.1") == "10.42.1.1"
    with Echo(two.namespace, "fd42:0:0:2::1"):
        assert echoes(one.namespace, "fd42:0:0:2::1") == "fd42:0:0:1::1"
    (peer,) = one.ask("peers")
    assert (peer["encapsulation"], peer["endpoint"]) == (encapsulation, underlay.format(2))
    assert all(count > 0 for count in peer["counters"].values())
    status = one.ask("status")
    for direction in ("encap", "decap"):
        counters, drops = status["counters"][direction], one.ask("drops")[direction]
        assert counters["received"] == counters["forwarded"] + sum(drops.values())


def test_status_says_what_there_is(node: Node) -> None:
    node.write_peers(PEER2)
    node.start()
    status = node.ask("status")
    volatile_keys = ("version", "uptime_seconds", "counters", "discovery", "offloads")
    volatile = {key: status.pop(key) for key in volatile_keys}
    assert status == {
        "node_id": "n1",
        "fault": None,
        "endpoints": ["192.0.2.1"],
        "prefixes": ["10.42.1.0/24", "fd42:0:0:1::/64"],
        "router_mac": format_mac(derive_mac("n1", "router")),
        "gateway_mac": format_mac(derive_mac("n1", "gateway")),
        "links": {"bridge": "loom0", "tap": "loom-tap"},
        "mtu": 1450,
        "encapsulation": "geneve",
        "vni": 1,
        "ports": {"geneve": 6081, "vxlan": [4789]},
        "peers": 1,
        "bgp": None,
    }
    assert volatile["offloads"].keys() == {
        "tso",
        "uso",
        "udp_segment",
        "udp_gro",
        "merge_tcp",
        "merge_udp",
        "uplink",
        "threaded_napi",
        "spin",
    }
    for offload in volatile["offloads"].values():
        assert offload["on"] == (offload["reason"] is None)
    assert 0 < volatile["uptime_seconds"] < 60
    assert set(volatile["counters"]) == {"encap", "decap"}
    assert volatile["discovery"].pop("age_seconds") < 60
    assert volatile["discovery"] == {
        "source": "static",
        "stored": False,
        "fault": None,
        "unannounced": None,
        "fenced": False,
    }


def test_what_a_person_reads(node: Node) -> None:
    node.write_peers(PEER2 + PEER3)
    node.start()
    status = node.run("status")
    assert (status.returncode, status.stderr) == (0, "")
    for expected in (
        "n1",
        "192.0.2.1",
        "loom0, loom-tap, MTU 1450",
        "geneve 6081, vxlan 4789",
        "2 from static",
    ):
        assert expected in status.stdout
    peers = node.run("peers")
    assert [line.split()[:4] for line in peers.stdout.splitlines() if " geneve " in line] == [
        ["n2", "192.0.2.2", "geneve", "6081"],
        ["n3", "192.0.2.3", "geneve", "6081"],
    ]
    assert "fd42:0:0:2::/64" in peers.stdout
    assert node.run("drops").stdout == "nothing was dropped\n"


def test_peers_follow_the_file(node: Node) -> None:
    node.write_peers(PEER2)
    node.start()
    assert peer_ids(node) == ["n2"]
    node.write_peers(PEER2 + PEER3)
    until(lambda: peer_ids(node) == ["n2", "n3"], "the new peer")
    node.write_peers(PEER3)
    until(lambda: peer_ids(node) == ["n3"], "the peer's departure")


def test_a_bad_peers_file_changes_nothing_and_is_shown(node: Node) -> None:
    node.write_peers(PEER2)
    node.start()
    node.write_peers(PEER2 + PEER3.replace("192.0.2.3", "192.0.2.2"))

    def fault() -> str | None:
        return node.ask("status")["discovery"]["fault"]  # type: ignore[no-any-return]

    expected = (
        f'{node.peers_file}: peer[1].endpoints[0] = "192.0.2.2": must be one peer\'s only; peer[0] has it'
    )
    assert until(fault, "the fault") == expected
    assert peer_ids(node) == ["n2"]
    assert "the peers are not up to date" in node.run("status").stdout
    assert node.log.count(expected) == 1
    node.write_peers(PEER2 + PEER3)
    until(lambda: fault() is None, "recovery")
    assert peer_ids(node) == ["n2", "n3"]


def test_a_bad_peers_file_at_the_start_leaves_the_node_its_own_pods(node: Node) -> None:
    node.write_peers("nonsense")
    node.start()
    assert peer_ids(node) == []
    assert "must be TOML" in node.ask("status")["discovery"]["fault"]


@pytest.mark.parametrize("how", ["SIGHUP", "verb"])
def test_reload_takes_over_what_may_change(node: Node, how: str) -> None:
    node.start()
    node.tables["tunnel"] = {"encapsulation": "vxlan"}
    node.config_file.write_text(node.text() + PEER2)
    reload(node, how)
    until(lambda: peer_ids(node) == ["n2"], "the new peer")
    assert node.ask("peers")[0]["encapsulation"] == "vxlan"
    assert node.ask("status")["encapsulation"] == "vxlan"


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("tunnel", "encapsulation", "gre", 'tunnel.encapsulation = "gre": must be "geneve" or "vxlan"'),
        ("tunnel", "geneve_port", 6082, 'tunnel.geneve_port = "6082": cannot change while podloom runs'),
        ("cluster", "vni", 2, 'cluster.vni = "2": cannot change while podloom runs: restart it'),
        ("node", "id", "other", 'node.id = "other": cannot change while podloom runs: restart it'),
        ("links", "tap", "other", 'links.tap = "other": cannot change while podloom runs: restart it'),
    ],
)
def test_a_refused_reload_changes_nothing(node: Node, section: str, key: str, value: Any, says: str) -> None:
    node.write_peers(PEER3)
    node.start()
    before = node.ask("status")
    node.tables.setdefault(section, {})[key] = value
    node.tables["discovery"]["file"] = str(node.directory / "others.toml")  # would be taken over by itself
    node.config_file.write_text(node.text() + PEER2)
    reload(node, "SIGHUP")
    until(lambda: says in node.log, "the refusal in the log")
    answer = verb(node, "reload")
    assert says in answer["error"]
    after = node.ask("status")
    for volatile in ("uptime_seconds", "counters"):
        del before[volatile], after[volatile]
    for status in (before, after):
        del status["discovery"]["age_seconds"]
    assert after == before
    assert peer_ids(node) == ["n3"]


def reload(node: Node, how: str) -> None:
    assert node.process is not None
    if how == "SIGHUP":
        node.process.send_signal(signal.SIGHUP)
    else:
        assert "result" in verb(node, "reload")


def verb(node: Node, name: str, /, **args: Any) -> Any:
    """One verb over the socket as any program would ask it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(node.control_socket))
        connection.sendall(json.dumps({"verb": name, "args": args}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            return json.loads(lines.readline())


def test_keep_on_exit_may_be_changed_while_running(node: Node) -> None:
    node.start()
    node.tables["links"] = {"keep_on_exit": False}
    node.write_config()
    assert verb(node, "reload") == {"result": {"changed": ["links.keep_on_exit"]}}
    assert node.stop() == 0
    assert "loom0" not in node.namespace.link_names()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(node: Node, number: int) -> None:
    node.start()
    assert node.stop(number) == 0
    assert "loom-tap" not in node.namespace.link_names()
    assert not node.control_socket.exists()
    assert "Traceback" not in node.log


def test_a_second_daemon_is_refused(node: Node) -> None:
    node.start()
    done = node.run("up")
    assert done.returncode == 1
    assert f"another podloom runs on {node.directory}/run: stop it first" in done.stderr
    node.tables["node"]["run_dir"] = str(node.directory / "run2")
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "TAP loom-tap is held by another process" in done.stderr
    assert until(lambda: verb(node, "status"), "the first goes on")["result"]["node_id"] == "n1"


def test_a_port_in_use_is_named(node: Node) -> None:
    holder = subprocess.Popen(
        node.namespace.command([sys.executable, "-c", ECHO.replace(", 7)", ", 4789)"), "192.0.2.1"]),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        node.write_config()
        done = node.run("up")
    finally:
        holder.kill()
        holder.communicate()
    assert done.returncode == 1
    assert "cannot listen on 192.0.2.1 UDP port 4789: Address already in use" in done.stderr
    assert node.namespace.link_names() == {"lo", "eth0", "wire"}, "a failed start leaves nothing behind"


def test_an_endpoint_no_device_has_is_named(node: Node) -> None:
    node.tables["node"]["endpoints"] = ["192.0.2.77"]
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "no device of this host has the address 192.0.2.77" in done.stderr


def test_too_small_an_underlay_for_ipv6_is_named(node: Node) -> None:
    node.namespace.ip("link", "set", "eth0", "mtu", "1300")
    node.write_config()
    done = node.run("up")
    assert done.returncode == 1
    assert "the underlay leaves pods an MTU of 1250, and IPv6 needs 1280" in done.stderr


def test_a_peer_that_is_ourselves_by_the_stored_id_is_refused(node: Node) -> None:
    """The id is not in the file, so only the running machine can tell."""
    del node.tables["node"]["id"]
    (node.directory / "state").mkdir()
    (node.directory / "state" / "node-id").write_text("n2\n")
    node.config_file.write_text(node.text() + PEER2)
    done = node.run("up")
    assert done.returncode == 2
    assert 'peer[0].id = "n2": is this node\'s own id; must name another node' in done.stderr
    assert node.namespace.link_names() == {"lo", "eth0", "wire"}


def test_the_id_survives_a_restart(node: Node) -> None:
    del node.tables["node"]["id"]
    node.start()
    first = node.ask("status")
    node.stop(signal.SIGKILL)
    node.start()
    second = node.ask("status")
    assert (first["node_id"], first["router_mac"]) == (second["node_id"], second["router_mac"])


def test_a_tap_that_is_deleted_again_and_again_ends_the_daemon(node: Node) -> None:
    """Once it is opened again (test_node_changes.py); to do that for ever would be to spin."""
    node.start()
    assert node.process is not None
    for _ in range(2):
        until(lambda: "loom-tap" in node.namespace.link_names(), "the TAP")
        node.namespace.ip("link", "del", "loom-tap")
    assert node.process.wait(10) == 1
    node.process = None
    assert "the data plane stopped" in node.log
    assert "Traceback" not in node.log
    node.start()
    assert "loom-tap" in node.namespace.link_names()


def test_directories_and_socket_are_root_s_alone(node: Node) -> None:
    (node.directory / "run").mkdir(mode=0o755)  # as a service manager may have made it
    node.start()
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in (node.control_socket.parent, node.control_socket)
    }
    assert modes == {"run": "0o700", "control.sock": "0o600"}
    abstract = [line for line in Path(f"/proc/{pid(node)}/net/unix").read_text().splitlines() if " @" in line]
    assert not [line for line in abstract if "podloom" in line]


def pid(node: Node) -> int:
    assert node.process is not None
    return node.process.pid


def test_unknown_verbs_and_args_are_answered(node: Node) -> None:
    node.start()
    refused = "verb = 'dance': must be status, peers, drops, offload, names, reload or cni"
    assert verb(node, "dance")["error"] == refused
    assert verb(node, "cni", env={"A": 1}, stdin="")["error"].startswith("cni takes env")
    assert verb(node, "cni", env={})["error"].startswith("cni takes env")
    assert verb(node, "offload", name="warp", on=True)["error"].startswith("offload takes name, one of tso")
    assert verb(node, "offload", name="tso", on=1)["error"].startswith("offload takes name")
    assert verb(node, "offload", name=[], on=True)["error"].startswith("offload takes name")


def test_offloads_switch_while_running_and_on_reload(node: Node) -> None:
    node.tables["offload"] = {"merge_udp": False}
    node.start()
    off = {"on": False, "reason": "switched off"}
    assert node.ask("status")["offloads"]["merge_udp"] == off
    assert verb(node, "offload", name="tso", on=False)["result"] == off
    assert node.ask("status")["offloads"]["tso"] == off
    assert node.run("offload", "tso", "on").stdout == "on\n"
    assert node.ask("status")["offloads"]["tso"] == {"on": True, "reason": None}
    node.tables["offload"] = {"udp_gro": False}
    node.write_config()
    assert set(verb(node, "reload")["result"]["changed"]) == {"offload.merge_udp", "offload.udp_gro"}
    offloads = node.ask("status")["offloads"]
    assert (offloads["merge_udp"]["on"], offloads["udp_gro"]) == (True, off)


def test_cni_calls_are_answered_in_parallel(node: Node) -> None:
    node.start()
    answers: list[Any] = []

    def call() -> None:
        answers.append(verb(node, "cni", env={"CNI_COMMAND": "VERSION"}, stdin='{"cniVersion": "1.0.0"}'))

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer["result"]["exit"] for answer in answers} == {0}
    assert "1.0.0" in json.loads(answers[0]["result"]["stdout"])["supportedVersions"]


def test_status_waits_for_no_other_call(node: Node, tmp_path: Path) -> None:
    """Every worker has a DEL whose IPAM plugin hangs: a runtime that asks is told the truth all the same."""
    node.start()
    started, go_on = tmp_path / "started", tmp_path / "go-on"
    plugin = tmp_path / "hangs"
    plugin.write_text(f"#!/bin/sh\necho >>{started}\nwhile [ ! -e {go_on} ]; do sleep 0.02; done\n")
    plugin.chmod(0o755)
    conf = {"cniVersion": "1.1.0", "name": "podnet", "type": "podloom-cni"}
    slow = json.dumps(conf | {"ipam": {"type": plugin.name}})
    done: list[int] = []

    def delete(number: int) -> None:
        env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": f"c{number}", "CNI_IFNAME": "eth0"}
        answer = verb(node, "cni", env=env | {"CNI_PATH": str(tmp_path)}, stdin=slow)
        done.append(answer["result"]["exit"])

    threads = [threading.Thread(target=delete, args=(number,)) for number in range(CNI_WORKERS)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: started.exists() and started.read_text().count("\n") == CNI_WORKERS, "all at work")
        answer = verb(node, "cni", env={"CNI_COMMAND": "STATUS"}, stdin=json.dumps(conf))
        assert (answer["result"], done) == ({"exit": 0, "stdout": ""}, [])
    finally:
        go_on.touch()
        for thread in threads:
            thread.join()
    assert done == [0] * CNI_WORKERS


def test_restarts_leak_no_descriptor(node: Node) -> None:
    """Reloading makes and ends a source each time."""
    node.start()
    reload(node, "verb")
    before = descriptors(node)
    for _ in range(20):
        reload(node, "verb")
    until(lambda: descriptors(node) <= before, "descriptors given back")


def descriptors(node: Node) -> int:
    return len(list(Path(f"/proc/{pid(node)}/fd").iterdir()))


def test_without_the_privilege_it_says_so(node: Node) -> None:
    node.write_config()
    done = node.python("-m", "forwarder", "up", "-c", str(node.config_file), under=NO_CAPABILITIES)
    assert done.returncode == 1
    assert done.stderr == (
        "podloom: ERROR: podloom up makes links and routes, which needs CAP_NET_ADMIN: run it as root "
        "(sudo podloom up)\n"
    )
    assert not (node.directory / "run").exists()


def test_without_the_tun_device_it_says_so(node: Node) -> None:
    node.write_config()
    empty_dev = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    done = node.python("-m", "forwarder", "up", "-c", str(node.config_file), under=empty_dev)
    assert done.returncode == 1
    assert done.stderr == (
        "podloom: ERROR: /dev/net/tun is missing: load the tun module (modprobe tun), or hand the device "
        "into this container\n"
    )


def test_asking_without_the_right_says_who_may(node: Node) -> None:
    node.start()
    # The directory is somebody else's and we are nobody special: as for any user who asks root's daemon.
    os.chown(node.control_socket.parent, 65534, 65534)
    words = ("status", "--socket", str(node.control_socket))
    done = node.python("-m", "forwarder", *words, under=NO_CAPABILITIES)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"podloom: {node.control_socket} is root's: run this as root\n"
