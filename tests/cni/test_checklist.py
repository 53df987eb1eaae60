"""The CNI specification as a numbered list: one test for each item, in the order of its sections.

Items 1-9 operations and environment, 10-17 ADD, 18-20 DEL, 21 CHECK, 22-25 GC, 26 STATUS, 27-33 delegation,
chains, capabilities and versions. Source: containernetworking/cni SPEC.md 1.1.0, CONVENTIONS.md, pkg/skel.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni import install
from cni.netlink import Netlink
from cni.result import VERSIONS
from cni.service import boot_clock, read_records
from tests.cni.conftest import NETWORK, Answer, Namespaces, Node, environment, links_of, run_plugin, sh
from tests.cni.runtime import DEBIAN_PLUGINS, PluginError, Runtime, debian_plugins, installed_plugin

pytestmark = pytest.mark.root

VALID = "cni.dev/valid-attachments"
GC_ENV = {"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}
STATUS_ENV = {"CNI_COMMAND": "STATUS"}


def code_of(answer: Answer) -> int:
    assert answer.exit != 0
    assert set(answer.body) - {"details"} == {"cniVersion", "code", "msg"}
    return int(answer.body["code"])


def gc(node: Node, valid: Any, **keys: Any) -> Answer:
    conf = node.conf("1.1.0") | {VALID: valid} | keys
    return Answer.of(*node.handle(GC_ENV, json.dumps(conf)))


def status(node: Node, **keys: Any) -> Answer:
    return Answer.of(*node.handle(STATUS_ENV, json.dumps(node.conf("1.1.0", **keys))))


def ours(node: Node, **keys: Any) -> dict[str, Any]:
    """Our plugin in a chain."""
    sockets = {"controlSocket": str(node.control_socket), "stateDir": str(node.state_dir)}
    return {"type": install.PLUGIN, **sockets, **keys}


def ports(node: Node) -> list[str]:
    return [name for name in node.links() if name.startswith("pl")]


# --- operations and environment


def test_01_the_error_is_one_object_on_stdout(node: Node) -> None:
    done = run_plugin(environment("ADD", "c1", CNI_NETNS="/nonexistent"), json.dumps(node.conf()).encode())
    assert done.returncode != 0
    assert done.stderr == b""
    assert json.loads(done.stdout)["code"] == 11
    assert done.stdout.count(b"\n") == 1


def test_02_the_error_object_is_whole(node: Node) -> None:
    answer = node.call("ADD", "c1", CNI_NETNS="/nonexistent")
    assert answer.body["cniVersion"] == "1.0.0"
    assert code_of(answer) == 4
    assert "/nonexistent" in answer.body["msg"]


def test_03_commands_and_variables() -> None:
    assert run_plugin({}, b"").returncode == 0
    unknown = run_plugin({"CNI_COMMAND": "FLY"}, b"{}")
    assert json.loads(unknown.stdout)["code"] == 4
    missing = json.loads(run_plugin({"CNI_COMMAND": "ADD"}, b'{"cniVersion": "1.0.0", "name": "x"}').stdout)
    assert missing["code"] == 4
    for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"):
        assert name in missing["msg"]


@pytest.mark.parametrize(
    ("env", "conf", "code"),
    [
        ({"CNI_CONTAINERID": "-c"}, {}, 4),
        ({"CNI_CONTAINERID": "c/1"}, {}, 4),
        *(({"CNI_IFNAME": name}, {}, 4) for name in ("a" * 16, ".", "..", "a/b", "a:b", "a b")),
        ({}, {"name": "-net"}, 7),
        ({}, {"name": ""}, 7),
        ({}, {"name": None}, 7),
    ],
)
def test_04_names(node: Node, env: dict[str, str], conf: dict[str, Any], code: int) -> None:
    assert code_of(node.call("ADD", "c1", node.conf(**conf), **env)) == code
    assert not node.state_dir.exists()


def test_04_stdin_that_is_no_json(node: Node) -> None:
    assert code_of(Answer.of(*node.handle(environment("ADD", "c1"), "{"))) == 6


@pytest.mark.parametrize("unknown", ["", "0.1.0", "0.2.0", "0.5.0", "1.2.0", "9.0.0"])
def test_05_versions_that_we_do_not_speak(node: Node, unknown: str) -> None:
    assert code_of(node.call("ADD", "c1", node.conf(unknown))) == 1


@pytest.mark.parametrize(
    ("command", "old"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0"), ("GC", "0.4.0")]
)
def test_05_verbs_that_came_later(node: Node, command: str, old: str) -> None:
    assert code_of(node.call(command, "c1", node.conf(old, **{VALID: []}))) == 1


def test_06_version_needs_nothing_else() -> None:
    for stdin, echoed in ((b"", "1.1.0"), (b'{"cniVersion": "0.4.0"}', "0.4.0")):
        body = json.loads(run_plugin({"CNI_COMMAND": "VERSION"}, stdin).stdout)
        assert body == {"cniVersion": echoed, "supportedVersions": list(VERSIONS)}


def test_07_the_nodes_own_namespace(node: Node) -> None:
    own = f"/run/netns/{node.name}"
    assert code_of(node.call("ADD", "c1", CNI_NETNS=own)) == 8
    # There the gateway is an address of its own, which only the kernel finds wrong.
    refused = node.call("ADD", "c1", CNI_NETNS=own, CNI_NETNS_OVERRIDE="1")
    assert code_of(refused) == 100
    assert "local address" in refused.body["msg"]
    assert (node.held(), ports(node)) == ([], [])


def test_08_unknown_variables(node: Node, namespaces: Namespaces, control_socket: Path) -> None:
    pod = namespaces.new()
    env = environment("ADD", pod, TRACEPARENT="00-1-2-03", TRACESTATE="x=y", BAGGAGE="z", CNI_FUTURE="1")
    assert run_plugin(env, json.dumps(node.conf()).encode()).returncode == 0


def test_09_installing_never_shows_half_a_file(tmp_path: Path) -> None:
    """A running old plugin keeps its inode, and the configuration comes after the plugin it names."""
    bin_dir, conf_dir = tmp_path / "bin", tmp_path / "conf"
    install.install(bin_dir, conf_dir)
    with (bin_dir / install.PLUGIN).open() as old:
        before = old.read()
        plugin, conflist = install.install(bin_dir, conf_dir)
        assert os.fstat(old.fileno()).st_ino != plugin.stat().st_ino
        old.seek(0)
        assert old.read() == before
    assert plugin.stat().st_mtime_ns <= conflist.stat().st_mtime_ns
    assert [path.name for path in (*bin_dir.iterdir(), *conf_dir.iterdir())] == [plugin.name, conflist.name]
    assert json.loads(conflist.read_text())["plugins"][0]["type"] == plugin.name
    assert run_plugin_at(plugin, {"CNI_COMMAND": "VERSION"})["supportedVersions"] == list(VERSIONS)


def run_plugin_at(path: Path, env: dict[str, str]) -> Any:
    done = subprocess.run([path], input=b"", capture_output=True, check=True, env=env, timeout=30)
    return json.loads(done.stdout)


# --- ADD


def test_10_an_interface_that_exists(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    sh("ip", "-n", pod, "link", "add", "eth0", "type", "bridge")
    assert code_of(node.call("ADD", pod)) == 4
    sh("ip", "-n", pod, "link", "del", "eth0")
    added = node.call("ADD", pod)
    assert code_of(node.call("ADD", pod)) == 101
    assert node.call("CHECK", pod, node.conf(prevResult=added.body)).exit == 0


def test_11_a_failure_undoes_everything(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delegate's ADD, which had worked, is undone by its DEL."""
    pod, log = namespaces.new(), node.state_dir.parent / "ipam.log"
    path = fake_ipam(node.state_dir.parent, log, '{"ips": [{"address": "10.71.0.9/24"}]}')
    node.call("DEL", pod)
    before = node.traces(pod)

    def broken(*_: object) -> None:
        raise OSError(5, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(Netlink, "add_address", broken)
        answer = node.call("ADD", pod, node.conf(ipam={"type": "fake"}), CNI_PATH=path)
    assert code_of(answer) == 5
    node.call("DEL", "nobody")  # the failure closed the socket it happened on
    assert node.traces(pod) == before
    assert log.read_text().split() == ["ADD", "DEL"]


def fake_ipam(directory: Path, log: Path, result: str, failing: str = "") -> str:
    """A CNI_PATH with the IPAM plugin `fake`, which logs its commands and fails at those in `failing`."""
    script = directory / "fake"
    script.write_text(
        f"#!/bin/sh\necho $CNI_COMMAND >>{log}\ncat >{log}.stdin\nenv >{log}.env\necho to the log >&2\n"
        f"case $CNI_COMMAND in {failing or 'NONE'}) "
        'echo \'{"code": 11, "msg": "not now"}\'; exit 1;; esac\n'
        f"[ $CNI_COMMAND = ADD ] && echo '{result}'; exit 0\n"
    )
    script.chmod(0o755)
    return f"/nonexistent:{directory}"


def test_12_the_previous_result_is_handed_on(node: Node, namespaces: Namespaces) -> None:
    earlier: dict[str, Any] = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "ib0", "sandbox": "/run/netns/x", "socketPath": "/s", "pciID": "0000:01"}],
        "ips": [{"address": "192.0.2.9/32", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.1"]},
    }
    body = node.call("ADD", namespaces.new(), node.conf("1.1.0", prevResult=earlier)).body
    assert body["interfaces"][0] == earlier["interfaces"][0] | {"mac": ""}
    assert body["ips"][0] == earlier["ips"][0]
    assert body["dns"] == earlier["dns"]
    assert {ip["interface"] for ip in body["ips"][1:]} == {2}


def test_13_the_shape_of_a_result(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    body = node.call("ADD", pod, node.conf("1.1.0")).body
    host, inside = body["interfaces"]
    assert (host["sandbox"], inside["sandbox"]) == ("", f"/run/netns/{pod}")
    assert host["mtu"] == inside["mtu"] == 1450
    assert [ip["interface"] for ip in body["ips"]] == [1, 1]
    assert {"dst": "0.0.0.0/0", "gw": "10.71.0.1"} in body["routes"]
    assert "dns" not in body
    told = {"nameservers": ["192.0.2.1"], "domain": "x", "search": ["y"], "options": ["ndots:5"]}
    assert node.call("ADD", namespaces.new(), node.conf(dns=told)).body["dns"] == told


def test_14_new_fields_only_in_new_results(node: Node, namespaces: Namespaces) -> None:
    """The second interface's default route has a priority, which results tell since 1.1.0."""
    for version in VERSIONS:
        pod = namespaces.new()
        assert node.call("ADD", pod, node.conf(version)).exit == 0
        body = node.call("ADD", pod, node.conf(version), CNI_IFNAME="net1").body
        newest = version == "1.1.0"
        assert all(("mtu" in interface) == newest for interface in body["interfaces"])
        assert all(("priority" in route) == newest for route in body["routes"])


def test_15_ip_versions_and_others_interface_indexes(
    node: Node, namespaces: Namespaces, version: str
) -> None:
    ips: list[dict[str, Any]] = [{"address": "192.0.2.1/32"}, {"address": "192.0.2.2/32", "interface": -1}]
    previous = {"cniVersion": version, "ips": [ip | {"version": "4"} for ip in ips]}
    body = node.call("ADD", namespaces.new(), node.conf(version, prevResult=previous)).body
    assert [ip.get("interface") for ip in body["ips"]] == [None, None, 1, 1]
    expected = [None] * 4 if version >= "1.0.0" else ["4", "4", "4", "6"]
    assert [ip.get("version") for ip in body["ips"]] == expected


def test_16_state_is_kept_by_network_container_and_interface(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    given = [node.call("ADD", pod, CNI_IFNAME=name).body["ips"][0]["address"] for name in ("eth0", "net1")]
    assert len(set(given)) == 2
    other = node.call("ADD", pod, node.conf(name="othernet"), CNI_IFNAME="net2")
    assert other.exit == 0
    assert node.call("DEL", pod).exit == 0
    assert sorted(key[2] for key in node.records()) == ["net1", "net2"]


def test_17_parallel_calls(node: Node, namespaces: Namespaces) -> None:
    pods = [namespaces.new() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            added = list(threads.map(lambda pod: node.call("ADD", pod), pods))
            assert len({ip["address"] for answer in added for ip in answer.body["ips"]}) == 16
            assert {answer.exit for answer in threads.map(lambda pod: node.call("DEL", pod), pods)} == {0}
    assert (node.held(), ports(node)) == ([], [])


# --- DEL


def test_18_del_succeeds_whatever_is_gone(node: Node, namespaces: Namespaces, control_socket: Path) -> None:
    """Also with no daemon, a namespace that is gone, and a prevResult that makes no sense."""
    pod = namespaces.new()
    assert node.call("DEL", pod).exit == 0
    assert node.call("ADD", pod).exit == 0
    sh("ip", "netns", "del", pod)
    conf = node.conf(prevResult={"ips": "nonsense"}, controlSocket="/nonexistent", mtu=17, spoofCheck="no")
    for _ in range(2):
        done = run_plugin(environment("DEL", pod), json.dumps(conf).encode(), in_namespace=node.name)
        assert (done.returncode, done.stdout) == (0, b"")
    assert (node.held(), node.records(), ports(node)) == ([], [], [])


def test_19_del_with_a_failing_delegate_can_be_repeated(node: Node, namespaces: Namespaces) -> None:
    pod, log = namespaces.new(), node.state_dir.parent / "ipam.log"
    result = '{"ips": [{"address": "10.71.0.9/24"}]}'
    path = fake_ipam(node.state_dir.parent, log, result)
    conf = node.conf(ipam={"type": "fake"})
    assert node.call("ADD", pod, conf, CNI_PATH=path).exit == 0
    fake_ipam(node.state_dir.parent, log, result, failing="DEL")
    failed = node.call("DEL", pod, conf, CNI_NETNS="", CNI_PATH=path)
    assert (code_of(failed), failed.body["details"]) == (11, "to the log")
    assert len(node.records()) == 1
    fake_ipam(node.state_dir.parent, log, result)
    assert node.call("DEL", pod, conf, CNI_NETNS="", CNI_PATH=path).exit == 0
    assert (node.records(), node.held(), ports(node)) == ([], [], [])
    assert log.read_text().split() == ["ADD", "DEL", "DEL"]


def test_20_real_problems_of_del_are_errors(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    node.call("ADD", pod)
    assert code_of(Answer.of(*node.handle(environment("DEL", pod), "{"))) == 6
    assert code_of(node.call("DEL", pod, CNI_CONTAINERID="")) == 4
    assert len(node.records()) == 1


# --- CHECK


def test_21_check_sees_what_is_ours_and_allows_the_rest(node: Node, namespaces: Namespaces) -> None:
    """Each kind of damage has its own case in test_verbs."""
    pod = namespaces.new()
    conf = node.conf(prevResult=node.call("ADD", pod).body)
    assert node.call("CHECK", pod, conf).exit == 0
    sh("ip", "-n", pod, "route", "add", "192.0.2.0/24", "via", "10.71.0.1")
    assert node.call("CHECK", pod, conf).exit == 0
    sh("ip", "-n", pod, "addr", "del", "10.71.0.2/32", "dev", "eth0")
    assert code_of(node.call("CHECK", pod, conf)) == 102


# --- GC


@pytest.mark.parametrize("key", [VALID, "cni.dev/attachments"])
@pytest.mark.parametrize("empty", [[], None])
def test_22_both_spellings_and_both_empty_lists(
    node: Node, namespaces: Namespaces, key: str, empty: object
) -> None:
    kept, stale = namespaces.new(), namespaces.new()
    for pod in (kept, stale):
        assert node.call("ADD", pod).exit == 0
    listed = [{"containerID": kept, "ifname": "eth0"}]
    for valid, left in ((listed, [kept]), (empty, [])):
        conf = node.conf("1.1.0") | {key: valid}
        assert Answer.of(*node.handle(GC_ENV, json.dumps(conf))) == Answer(0, None)
        assert [record[1] for record in node.records()] == left
        assert len(ports(node)) == len(left)
        assert len(node.held()) == 2 * len(left)


@pytest.mark.parametrize("bad", ["x", {}, [1], [{}], [{"containerID": "c", "ifname": 1}], [{"ifname": "e"}]])
def test_22_nothing_is_deleted_without_a_list(node: Node, namespaces: Namespaces, bad: object) -> None:
    node.call("ADD", namespaces.new())
    assert code_of(Answer.of(*node.handle(GC_ENV, json.dumps(node.conf("1.1.0"))))) == 7
    assert code_of(gc(node, bad)) == 7
    assert len(node.held()) == 2


def test_23_gc_goes_on_after_errors_and_tells_them(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = [namespaces.new() for _ in range(3)]
    for pod in pods:
        node.call("ADD", pod)
    node.call("ADD", pods[0], node.conf(name="othernet"), CNI_IFNAME="net1")
    refuse_one, delete = [True], Netlink.delete_link

    def refuse_once(self: Netlink, name: str) -> None:
        if refuse_one:
            refuse_one.clear()
            raise OSError(1, "injected")
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Netlink, "delete_link", refuse_once)
        answer = gc(node, [])
    assert code_of(answer) == 103
    assert "injected" in answer.body["details"]
    assert len(node.records()) == 2
    assert gc(node, []).exit == 0
    assert [record[0] for record in node.records()] == ["othernet"]
    assert len(ports(node)) == 1


def test_23_gc_finds_links_of_a_lost_store(node: Node, namespaces: Namespaces) -> None:
    node.call("ADD", namespaces.new())
    node.call("ADD", namespaces.new(), node.conf(name="podnet2"))
    node.service.close()
    for path in node.state_dir.iterdir():
        path.unlink()
    assert gc(node, []).exit == 0
    assert len(ports(node)) == 1


def test_23_gc_goes_to_the_delegate(node: Node) -> None:
    log = node.state_dir.parent / "ipam.log"
    path = fake_ipam(node.state_dir.parent, log, "")
    conf = node.conf("1.1.0", ipam={"type": "fake"}) | {VALID: []}
    assert Answer.of(*node.handle(GC_ENV | {"CNI_PATH": path}, json.dumps(conf))).exit == 0
    assert log.read_text().split() == ["GC"]
    assert json.loads(Path(f"{log}.stdin").read_text()) == conf


def test_24_an_add_that_is_newer_than_the_gc_is_left_alone(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list was made before: GC is held up after its start while an ADD goes through."""
    from cni import upkeep

    pod, stale, began, added = namespaces.new(), namespaces.new(), threading.Event(), threading.Event()
    node.call("ADD", stale)
    collect = upkeep.collect

    def late(*args: Any) -> None:
        began.set()
        assert added.wait(10)
        collect(*args)

    monkeypatch.setattr(upkeep, "collect", late)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(gc, node, [])
        assert began.wait(10)
        fresh = node.call("ADD", pod)
        added.set()
        assert answer.result().exit == 0
    assert node.call("CHECK", pod, node.conf(prevResult=fresh.body)).exit == 0
    assert [record[1] for record in node.records()] == [pod]


def test_24_a_gc_that_waited_for_its_turn(node: Node, namespaces: Namespaces) -> None:
    """The daemon was busy: since the plugin began, an ADD has come and gone that the list cannot know."""
    stale, pod = namespaces.new(), namespaces.new()
    node.call("ADD", stale)
    began_at = boot_clock()
    node.call("ADD", pod)
    conf = json.dumps(node.conf("1.1.0") | {VALID: []})
    assert node.handle(GC_ENV, conf, began_at) == (0, "")
    assert [record[1] for record in node.records()] == [pod]
    assert node.handle(GC_ENV, conf, boot_clock() + 1e9) == (0, ""), "nobody began in the future"
    assert node.records() == []


def test_25_keys_of_the_runtime_are_tolerated(node: Node, namespaces: Namespaces) -> None:
    keys: dict[str, Any] = {
        "disableGC": True,
        "disableCheck": True,
        "cniVersions": ["1.0.0"],
        "loadOnlyInlinedPlugins": True,
        "capabilities": {"ips": True},
        "some.vendor/key": {"x": [1]},
    }
    pod = namespaces.new()
    assert node.call("ADD", pod, node.conf(**keys)).exit == 0
    assert node.call("DEL", pod, node.conf(**keys)).exit == 0


# --- STATUS


def test_26_status_tells_the_truth(node: Node, namespaces: Namespaces) -> None:
    assert status(node) == Answer(0, None)
    narrow = {"ranges": [[{"subnet": "10.71.0.8/30"}]]}
    pods = [namespaces.new(), namespaces.new()]
    for pod in pods:
        assert node.call("ADD", pod, node.conf(ipam=narrow)).exit == 0
    full = status(node, ipam=narrow)
    assert code_of(full) == 50
    assert "10.71.0.9 to 10.71.0.10" in full.body["msg"]
    assert node.call("DEL", pods[0]).exit == 0
    assert status(node, ipam=narrow).exit == 0, "DEL is served after a bad STATUS, and makes room"
    sh("ip", "-n", node.name, "link", "set", "loom0", "down")
    assert code_of(status(node)) == 51
    sh("ip", "-n", node.name, "link", "del", "loom0")
    assert code_of(status(node)) == 51


@pytest.mark.parametrize("harm", ["down", "nomaster", "gone"])
def test_26_status_tells_of_a_way_to_the_others_that_is_cut(node: Node, harm: str) -> None:
    sh("ip", "-n", node.name, "link", "add", "tap0", "up", "master", "loom0", "type", "veth")
    node.service.network = replace(NETWORK, tap="tap0")
    assert status(node).exit == 0
    sh("ip", "-n", node.name, "link", *(("del", "tap0") if harm == "gone" else ("set", "tap0", harm)))
    cut = status(node)
    assert (code_of(cut), "tap0" in cut.body["msg"]) == (51, True)


def test_26_status_without_a_daemon_or_a_store(node: Node) -> None:
    conf = json.dumps(node.conf("1.1.0")).encode()
    done = run_plugin(STATUS_ENV, conf)
    assert json.loads(done.stdout)["code"] == 51
    assert not node.state_dir.exists(), "it has no side effects"
    node.state_dir.write_text("not a directory")
    assert code_of(status(node)) == 50


def test_26_status_asks_the_delegate_and_is_quick(node: Node, control_socket: Path, tmp_path: Path) -> None:
    log = tmp_path / "ipam.log"
    path = fake_ipam(tmp_path, log, "", failing="STATUS")
    conf = json.dumps(node.conf("1.1.0", ipam={"type": "fake"}))
    assert code_of(Answer.of(*node.handle(STATUS_ENV | {"CNI_PATH": path}, conf))) == 50
    assert status(node).exit == 0
    times = []
    for _ in range(20):
        started = time.perf_counter()
        assert status(node).exit == 0
        times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.05


# --- delegation, chains, capabilities, versions


def test_27_delegation(node: Node, namespaces: Namespaces, tmp_path: Path) -> None:
    """Complete configuration on stdin, the caller's environment, and a result that fits a routed pod."""
    log, pod = tmp_path / "ipam.log", namespaces.new()
    result = json.dumps(
        {
            "cniVersion": "1.0.0",
            "ips": [{"address": "10.71.0.77/24", "gateway": "10.71.0.1"}, {"address": "fd71::77/64"}],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "192.0.2.0/24", "gw": "10.71.0.1"}, {"dst": "::/0"}],
            "dns": {"nameservers": ["10.96.0.10"]},
        }
    )
    path = fake_ipam(tmp_path, log, result)
    conf = node.conf(
        "1.1.0", ipam={"type": "fake", "deep": {"x": [1, "ü"]}}, runtimeConfig={"ips": ["1.2.3.4"]}
    )
    added = node.call("ADD", pod, conf, CNI_PATH=path, TRACEPARENT="00-1-2-03")
    assert added.exit == 0, added
    assert json.loads(Path(f"{log}.stdin").read_text()) == conf
    expected = environment("ADD", pod, CNI_PATH=path, TRACEPARENT="00-1-2-03")
    assert expected.items() <= {
        tuple(line.split("=", 1)) for line in Path(f"{log}.env").read_text().split("\n")
    }
    assert added.body["ips"] == [
        {"address": "10.71.0.77/32", "gateway": "10.71.0.1", "interface": 1},
        {"address": "fd71::77/128", "gateway": "fd71::1", "interface": 1},
    ]
    assert added.body["dns"] == {"nameservers": ["10.96.0.10"]}
    routes = {route["dst"] for route in json.loads(sh("ip", "-n", pod, "-j", "-4", "route"))}
    assert routes == {"default", "10.71.0.1", "192.0.2.0/24"}
    again = conf | {"prevResult": added.body}
    assert node.call("CHECK", pod, again, CNI_PATH=path).exit == 0
    assert node.call("DEL", pod, again, CNI_PATH=path).exit == 0
    assert log.read_text().split() == ["ADD", "CHECK", "DEL"]


@pytest.mark.parametrize(
    ("ipam", "code"),
    [("absent", 7), ("../fake", 7), ("/bin/sh", 7), ("..", 7), ("a b", 7)],
)
def test_27_the_delegates_name_is_no_path(node: Node, namespaces: Namespaces, ipam: str, code: int) -> None:
    pod = namespaces.new()
    assert code_of(node.call("ADD", pod, node.conf(ipam={"type": ipam}), CNI_PATH="/usr/bin")) == code
    assert (sorted(links_of(pod)), ports(node)) == (["lo"], [])


@pytest.mark.parametrize(
    "result", ["", "[]", "{}", '{"ips": [{"address": "192.0.2.9/24"}]}', '{"ips": [{"address": "x"}]}']
)
def test_27_a_delegates_answer_is_checked(
    node: Node, namespaces: Namespaces, tmp_path: Path, result: str
) -> None:
    pod, log = namespaces.new(), tmp_path / "ipam.log"
    path = fake_ipam(tmp_path, log, result)
    node.call("DEL", pod)
    before = node.traces(pod)
    assert code_of(node.call("ADD", pod, node.conf(ipam={"type": "fake"}), CNI_PATH=path)) in (6, 7)
    assert node.traces(pod) == before
    assert log.read_text().split() == ["ADD", "DEL"]


@pytest.mark.parametrize("family", ["4", "6", "both"])
def test_28_a_chain_of_reference_plugins(
    node: Node, namespaces: Namespaces, control_socket: Path, tmp_path: Path, family: str
) -> None:
    """All of them after us; DEL goes backwards."""
    debian_plugins("portmap", "bandwidth", "tuning", "firewall", "sbr", "host-local")
    subnets = {"4": ["10.71.0.0/24"], "6": ["fd71::/64"], "both": ["10.71.0.0/24", "fd71::/64"]}[family]
    ipam = {
        "type": "host-local",
        "dataDir": str(tmp_path / "host-local"),
        "ranges": [[{"subnet": subnet}] for subnet in subnets],
        "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
    }
    runtime = Runtime(
        node.name,
        [
            ours(node, ipam=ipam),
            {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}},
            {"type": "bandwidth", "capabilities": {"bandwidth": True}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
            {"type": "firewall", "backend": "iptables"},
            {"type": "sbr"},
        ],
        [installed_plugin(tmp_path), DEBIAN_PLUGINS],
    )
    pod = namespaces.new()
    wishes: dict[str, Any] = {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": dict.fromkeys(("ingressRate", "ingressBurst", "egressRate", "egressBurst"), 10**8),
    }
    links = sorted(node.links())
    result = runtime.add(pod, **wishes)
    assert len(result["ips"]) == len(subnets)
    assert "8080" in sh("ip", "netns", "exec", node.name, "iptables-save") or family == "6"
    # portmap 1.1 looks for its rules in both families, whatever the pod has.
    runtime.check(pod, but=["portmap"], **wishes)
    runtime.delete(pod, **wishes)
    assert sorted(node.links()) == links
    assert "8080" not in sh("ip", "netns", "exec", node.name, "iptables-save")
    assert [
        path.name for path in (tmp_path / "host-local" / "podnet").iterdir() if path.name[0] in "1f"
    ] == []


def test_28_reference_plugins_before_us(
    node: Node, namespaces: Namespaces, control_socket: Path, tmp_path: Path
) -> None:
    """They work on what a plugin before them made; ours adds its interface, and hands all of it on.

    bandwidth and sbr look for the interface that CNI_IFNAME names, which only we make: they come after us.
    """
    debian_plugins("portmap", "tuning", "firewall", "bandwidth", "sbr")
    pod = namespaces.new()
    earlier = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "first0", "sandbox": f"/run/netns/{pod}"}],
        "ips": [{"address": "192.0.2.9/24"}],
    }
    fake_ipam(tmp_path, tmp_path / "log", json.dumps(earlier))
    before: Sequence[dict[str, Any]] = (
        {"type": "tuning", "sysctl": {"net.ipv4.ip_default_ttl": "65"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "firewall", "backend": "iptables"},
    )
    after = ({"type": "bandwidth", "capabilities": {"bandwidth": True}}, {"type": "sbr"})
    paths = [installed_plugin(tmp_path), DEBIAN_PLUGINS, tmp_path]
    runtime = Runtime(node.name, [{"type": "fake"}, *before, ours(node), *after], paths)
    wishes: dict[str, Any] = {
        "portMappings": [{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": dict.fromkeys(("ingressRate", "ingressBurst", "egressRate", "egressBurst"), 10**8),
    }
    links = sorted(node.links())
    result = runtime.add(pod, **wishes)
    assert [ip["address"] for ip in result["ips"]] == ["192.0.2.9/24", "10.71.0.2/32", "fd71::2/128"]
    assert sh("ip", "netns", "exec", pod, "sysctl", "-n", "net.ipv4.ip_default_ttl").strip() == "65"
    assert "192.0.2.9:80" in sh("ip", "netns", "exec", node.name, "iptables-save")
    # firewall 1.1 looks for rules for what came after it, too.
    runtime.check(pod, but=["portmap", "firewall"], **wishes)
    runtime.delete(pod, **wishes)
    assert (sorted(node.links()), node.held()) == (links, [])
    assert "192.0.2.9" not in sh("ip", "netns", "exec", node.name, "iptables-save")


@pytest.mark.parametrize("how", ["DEL", "GC"])
def test_28_a_plugin_after_us_that_fails_for_ever(
    node: Node, namespaces: Namespaces, control_socket: Path, tmp_path: Path, how: str
) -> None:
    """A runtime that goes on after its DEL reaches ours; for one that stops there, GC is left."""
    pod, paths = namespaces.new(), [installed_plugin(tmp_path), tmp_path]
    fake_ipam(tmp_path, tmp_path / "log", "", failing="ADD|DEL|GC")
    runtime = Runtime(node.name, [ours(node), {"type": "fake"}], paths, version="1.1.0")
    for call in (runtime.add, runtime.delete):
        with pytest.raises(PluginError, match="fake"):
            call(pod)
    assert len(node.held()) == 2
    if how == "GC":
        assert [failure.plugin for failure in runtime.collect([])] == ["fake"]
    else:
        Runtime(node.name, [ours(node)], paths).delete(pod)
    assert (node.held(), node.records(), ports(node)) == ([], [], [])


def test_28_status_and_gc_through_the_chain(
    node: Node, namespaces: Namespaces, control_socket: Path, tmp_path: Path
) -> None:
    runtime = Runtime(node.name, [ours(node)], [installed_plugin(tmp_path)], version="1.1.0")
    kept, stale = namespaces.new(), namespaces.new()
    runtime.status()
    runtime.add(kept)
    runtime.add(stale)
    assert runtime.collect([(kept, "eth0")]) == []
    runtime.check(kept)
    assert len(node.records()) == 1


def test_29_capabilities_come_only_where_declared(
    node: Node, namespaces: Namespaces, control_socket: Path, tmp_path: Path
) -> None:
    paths = [installed_plugin(tmp_path)]
    declared = Runtime(node.name, [ours(node, capabilities={"ips": True})], paths)
    silent = Runtime(node.name, [ours(node)], paths)
    asked = ["10.71.0.200/24"]
    assert declared.add(namespaces.new(), ips=asked)["ips"][0]["address"] == "10.71.0.200/32"
    assert silent.add(namespaces.new(), ips=asked)["ips"][0]["address"] != "10.71.0.200/32"


CAPABILITIES: dict[str, tuple[dict[str, Any], int]] = {
    "ips": ({"ips": ["10.71.0.50", "fd71::50/64"]}, 0),
    "ips outside": ({"ips": ["192.0.2.1"]}, 7),
    "ips gateway": ({"ips": ["10.71.0.1"]}, 7),
    "ips nonsense": ({"ips": ["x"]}, 7),
    "ips no list": ({"ips": "10.71.0.50"}, 7),
    "ipRanges": ({"ipRanges": [[{"subnet": "10.71.0.64/26", "rangeStart": "10.71.0.70"}]]}, 0),
    "ipRanges outside": ({"ipRanges": [[{"subnet": "10.72.0.0/24"}]]}, 7),
    "mac": ({"mac": "02:00:5E:10:00:01"}, 0),
    "mac multicast": ({"mac": "03:00:5e:10:00:01"}, 7),
    "mac short": ({"mac": "02:00"}, 7),
    "dns": ({"dns": {"servers": ["192.0.2.1"], "searches": ["a.b"], "options": ["ndots:5"]}}, 0),
    "dns nonsense": ({"dns": {"servers": "192.0.2.1"}}, 7),
    "cgroupPath": ({"cgroupPath": "/kubepods/pod1"}, 0),
    "portMappings": ({"portMappings": [{"hostPort": 80, "containerPort": 80}]}, 2),
    "portMappings none": ({"portMappings": []}, 0),
    "bandwidth": ({"bandwidth": {"ingressRate": 1}}, 2),
    "aliases": ({"aliases": ["web", "front.shop"]}, 0),
    "aliases nonsense": ({"aliases": ["a b"]}, 7),
    "aliases unserved": ({"aliases": ["web"]}, 2),
    "infinibandGUID": ({"infinibandGUID": "24:8a:07:03:00:8d:ae:2e"}, 2),
    "deviceID": ({"deviceID": "0000:04:00.5"}, 2),
}


@pytest.mark.parametrize("case", CAPABILITIES)
def test_30_capabilities(node: Node, namespaces: Namespaces, case: str) -> None:
    wish, code = CAPABILITIES[case]
    pod = namespaces.new()
    node.service.network = replace(NETWORK, serves_names=case != "aliases unserved")
    answer = node.call("ADD", pod, node.conf(runtimeConfig=wish))
    if code:
        assert code_of(answer) == code
        assert case.split()[0] in answer.body["msg"] or "ips" in case or "ipRanges" in case
        assert (node.held(), ports(node)) == ([], [])
        return
    assert answer.exit == 0, answer
    addresses = [ip["address"] for ip in answer.body["ips"]]
    if case == "ips":
        assert addresses == ["10.71.0.50/32", "fd71::50/128"]
    elif case == "ipRanges":
        assert addresses == ["10.71.0.70/32"]
    elif case == "mac":
        assert links_of(pod)["eth0"]["address"] == "02:00:5e:10:00:01" == answer.body["interfaces"][1]["mac"]
        assert code_of(node.call("ADD", namespaces.new(), node.conf(runtimeConfig=wish))) == 11
    elif case == "aliases":
        (record,) = read_records(node.state_dir)
        assert record.aliases == ("web", "front.shop")
    elif case == "dns":
        told = {"nameservers": ["192.0.2.1"], "search": ["a.b"], "options": ["ndots:5"]}
        assert answer.body["dns"] == told
    assert node.call("DEL", pod, node.conf(runtimeConfig=wish)).exit == 0


def test_31_precedence_of_what_is_asked(node: Node, namespaces: Namespaces) -> None:
    """runtimeConfig before args.cni before CNI_ARGS; Kubernetes' arguments are recorded."""
    env = {"CNI_ARGS": "IgnoreUnknown=1;IP=10.71.0.30;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_UID=u"}
    args = {"cni": {"ips": ["10.71.0.31"], "labels": [{"key": "app", "value": "x"}]}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "10.71.0.30/32"),
        ({"args": args}, "10.71.0.31/32"),
        ({"args": args, "runtimeConfig": {"ips": ["10.71.0.32"]}}, "10.71.0.32/32"),
    ]
    for keys, expected in cases:
        answer = node.call("ADD", namespaces.new(), node.conf(**keys), **env)
        assert answer.body["ips"][0]["address"] == expected
    taken = node.call("ADD", namespaces.new(), node.conf(), **env)
    assert code_of(taken) == 11
    assert "10.71.0.30 is held by podnet/" in taken.body["msg"]


def test_32_keys_with_a_standard_meaning(node: Node, namespaces: Namespaces) -> None:
    """What we do not do is refused with its key and value, never ignored."""
    pod = namespaces.new()
    assert node.call("ADD", pod, node.conf(ipMasq=False, ipam={}, dns={"domain": "x"})).exit == 0
    refused = node.call("ADD", namespaces.new(), node.conf(ipMasq=True))
    assert code_of(refused) == 2
    assert "ipMasq is true" in refused.body["msg"]
    odd = node.call("ADD", namespaces.new(), node.conf(ipam={"type": "podloom", "subnet": "10.71.0.0/24"}))
    assert code_of(odd) == 2
    assert "ipam.subnet is '10.71.0.0/24'" in odd.body["msg"]


def test_33_the_versions_differences(node: Node, namespaces: Namespaces, version: str) -> None:
    """ADD and DEL are in all of them; CHECK from 0.4.0 and GC and STATUS from 1.1.0."""
    pod = namespaces.new()
    added = node.call("ADD", pod, node.conf(version))
    assert added.body["cniVersion"] == version
    assert ("version" in added.body["ips"][0]) == (version < "1.0.0")
    check = node.call("CHECK", pod, node.conf(version, prevResult=added.body))
    assert (check.exit == 0) == (version >= "0.4.0")
    for env in (GC_ENV, STATUS_ENV):
        valid = [{"containerID": pod, "ifname": "eth0"}]
        done = Answer.of(*node.handle(env, json.dumps(node.conf(version) | {VALID: valid})))
        assert (done.exit == 0) == (version == "1.1.0")
    assert node.call("DEL", pod, node.conf(version, prevResult=added.body)).exit == 0
    assert (node.held(), ports(node)) == ([], [])
