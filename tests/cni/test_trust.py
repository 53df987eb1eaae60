"""What an operator relies on: no program is started, files are root's, a broken disk changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cni import cli, install
from tests.cni.conftest import REPOSITORY, Answer, Namespaces, Node, environment, links_of
from tests.cni.runtime import DEBIAN_PLUGINS, debian_plugins, installed_plugin

pytestmark = pytest.mark.root

EXECVE = re.compile(r'execve\("([^"]*)"')


def executed(trace: Path) -> list[str]:
    return EXECVE.findall(trace.read_text())


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_no_shell_and_no_other_program(
    node: Node, namespaces: Namespaces, tmp_path: Path, command: str
) -> None:
    """The service's whole process is traced."""
    pod = namespaces.new()
    if command == "DEL":
        assert node.call("ADD", pod).exit == 0
        node.service.close()
    call = {"env": environment(command, pod), "stdin": json.dumps(node.conf())}
    assert traced(node, call, tmp_path / "trace") == [sys.executable]


def traced(node: Node, call: dict[str, Any], trace: Path) -> list[str]:
    """What a process of its own executes that answers the call, which must succeed."""
    if shutil.which("strace") is None:
        pytest.skip("no strace: what ADD executes is NOT tested in this run")
    script = (
        "import json, sys; from pathlib import Path; from cni.service import CniService;"
        "from tests.cni.conftest import NETWORK; call = json.load(sys.stdin);"
        "service = CniService(NETWORK, Path(call['state_dir']));"
        "print(service.handle(call['env'], call['stdin']))"
    )
    done = subprocess.run(
        [
            *("ip", "netns", "exec", node.name, "strace", "-f", "-e", "trace=execve", "-o", str(trace)),
            *(sys.executable, "-c", script),
        ],
        input=json.dumps(call | {"state_dir": str(node.state_dir)}),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.startswith("(0,"), done.stdout
    return executed(trace)


def test_a_delegated_plugin_is_all_that_is_executed(
    node: Node, namespaces: Namespaces, tmp_path: Path
) -> None:
    debian_plugins("host-local")
    ipam = {"type": "host-local", "dataDir": str(tmp_path / "d"), "ranges": [[{"subnet": "10.71.0.0/24"}]]}
    call = {
        "env": environment("ADD", namespaces.new(), CNI_PATH=str(DEBIAN_PLUGINS)),
        "stdin": json.dumps(node.conf(ipam=ipam)),
    }
    assert traced(node, call, tmp_path / "trace") == [sys.executable, str(DEBIAN_PLUGINS / "host-local")]


def test_the_plugin_executes_only_itself(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace: what the plugin executes is NOT tested in this run")
    plugin, trace = installed_plugin(tmp_path) / install.PLUGIN, tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-e", "trace=execve", "-o", str(trace), str(plugin)],
        input=b"{}",
        check=False,
        capture_output=True,
        env={"CNI_COMMAND": "STATUS"},
    )
    assert executed(trace) == [str(plugin)]


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("harm", ["read-only", "full"])
def test_a_disk_that_does_not_take_writes(node: Node, namespaces: Namespaces, harm: str) -> None:
    """ADD and DEL are clear errors, what runs is untouched, and all is well when the disk is."""
    pod, other = namespaces.new(), namespaces.new()
    node.state_dir.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(node.state_dir)]
    subprocess.run(mount, check=True)
    ballast = node.state_dir / "ballast"
    try:
        added = node.call("ADD", pod)
        assert added.exit == 0
        if harm == "read-only":
            node.service.close()
            subprocess.run(["mount", "-o", "remount,ro", str(node.state_dir)], check=True)
        else:
            with pytest.raises(OSError, match="No space"):
                fill(ballast)
        links = sorted(node.links())
        refused = node.call("ADD", other)
        assert (refused.exit, refused.body["code"]) == (1, 5)
        assert str(node.state_dir) in refused.body["msg"]
        assert sorted(node.links()) == links
        assert set(links_of(other)) == {"lo"}
        if harm == "read-only":
            node.service.close()
            subprocess.run(["mount", "-o", "remount,rw", str(node.state_dir)], check=True)
        ballast.unlink(missing_ok=True)
        assert node.call("CHECK", pod, node.conf(prevResult=added.body)).exit == 0
        assert node.call("ADD", other).exit == 0
        assert node.call("DEL", pod).exit == 0
        node.service.close()
    finally:
        subprocess.run(["umount", "-l", str(node.state_dir)], check=False)


def test_another_user_is_turned_away(node: Node, namespaces: Namespaces, tmp_path: Path) -> None:
    """The state is root's alone, and nothing of it is in the abstract namespace of sockets."""
    assert node.call("ADD", namespaces.new()).exit == 0
    for path in (node.state_dir, *node.state_dir.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_uid == os.getuid()
    assert not [line for line in Path("/proc/net/unix").read_text().splitlines() if "@podloom" in line]


def test_install_and_uninstall_leave_what_was_there(tmp_path: Path) -> None:
    bin_dir, conf_dir = tmp_path / "bin", tmp_path / "conf"
    for directory in (bin_dir, conf_dir):
        directory.mkdir()
    (bin_dir / "portmap").write_text("#!/bin/sh\n")
    (bin_dir / "portmap").chmod(0o755)
    (conf_dir / "99-loopback.conf").write_text("{}")
    before = sorted(map(str, tmp_path.rglob("*")))
    install.install(bin_dir, conf_dir, network="net", control_socket="/x.sock", state_dir="/y")
    plugins = json.loads((conf_dir / install.CONFLIST).read_text())["plugins"]
    assert [plugin["type"] for plugin in plugins] == [install.PLUGIN, "portmap"]
    assert (plugins[0]["controlSocket"], plugins[0]["stateDir"]) == ("/x.sock", "/y")
    assert [path.name for path in install.uninstall(bin_dir, conf_dir)] == [install.CONFLIST, install.PLUGIN]
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert install.uninstall(bin_dir, conf_dir) == []


def test_install_takes_no_others_place(tmp_path: Path) -> None:
    (tmp_path / install.PLUGIN).write_text("somebody else's")
    with pytest.raises(install.InstallError, match="move it away"):
        install.install(tmp_path, tmp_path / "conf")
    assert not (tmp_path / "conf").exists()


def test_podloom_pods(node: Node, namespaces: Namespaces) -> None:
    assert cli.pods(node.state_dir) == []
    pod = namespaces.new()
    added = node.call("ADD", pod)
    (found,) = cli.pods(node.state_dir)
    since = found.pop("since")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", since)
    assert found == {
        "pod": "default/web-0",
        "container": pod,
        "network": "podnet",
        "interface": "eth0",
        "addresses": ["10.71.0.2", "fd71::2"],
        "veth": added.body["interfaces"][0]["name"],
    }
    shown = subprocess.run(
        [sys.executable, "-m", "forwarder", "pods", "--state-dir", str(node.state_dir)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    ).stdout.splitlines()
    assert shown[0].split() == ["POD", "NETWORK", "INTERFACE", "ADDRESSES", "VETH", "SINCE"]
    assert shown[1].split()[0] == "default/web-0"


def test_several_ranges_and_exclusions(node: Node, namespaces: Namespaces) -> None:
    """Ranges of a set are used in turn; what is excluded is never given."""
    ipam: dict[str, Any] = {
        "ranges": [
            [
                {"subnet": "10.71.0.0/24", "rangeStart": "10.71.0.20", "rangeEnd": "10.71.0.22"},
                {"subnet": "10.71.0.0/24", "rangeStart": "10.71.0.40", "rangeEnd": "10.71.0.41"},
            ]
        ],
        "exclude": ["10.71.0.21", "10.71.0.40/32"],
    }
    given = []
    for _ in range(4):
        answer: Answer = node.call("ADD", namespaces.new(), node.conf(ipam=ipam))
        given.append(answer.body["ips"][0]["address"] if answer.exit == 0 else answer.body["code"])
    assert given == ["10.71.0.20/32", "10.71.0.22/32", "10.71.0.41/32", 11]


@pytest.mark.parametrize(("keys", "then"), [({}, "10.71.0.3/32"), ({"quarantineSeconds": 0}, "10.71.0.2/32")])
def test_how_long_addresses_rest_is_configured(
    node: Node, namespaces: Namespaces, keys: dict[str, Any], then: str
) -> None:
    """All have been given. While they rest the longest at rest comes next, and the next in turn otherwise."""
    subnet = {"subnet": "10.71.0.0/24", "rangeStart": "10.71.0.2", "rangeEnd": "10.71.0.4"}
    conf, pods = node.conf(ipam={"ranges": [[subnet]]}), [namespaces.new() for _ in range(3)]
    conf["ipam"] |= keys
    for pod in pods:
        assert node.call("ADD", pod, conf).exit == 0
    for pod in (pods[1], pods[0]):
        assert node.call("DEL", pod, conf).exit == 0
    assert node.call("ADD", pods[0], conf).body["ips"][0]["address"] == then


BAD_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ipam.ranges[0] ": {"ipam": {"ranges": [[]]}},
    "ipam.ranges[0][0].subnet ": {"ipam": {"ranges": [[{}]]}},
    "ipam.ranges[0][0].rangeStart ": {
        "ipam": {"ranges": [[{"subnet": "10.71.0.0/24", "rangeStart": "10.72.0.1"}]]}
    },
    "ipam.ranges[0][0].gateway ": {"ipam": {"ranges": [[{"subnet": "10.71.0.0/24", "gateway": "x"}]]}},
    "ipam.exclude ": {"ipam": {"exclude": ["10.71.0.0/99"]}},
    "ipam.quarantineSeconds is -1": {"ipam": {"quarantineSeconds": -1}},
    "mtu ": {"mtu": 1279},
    "mtu is 9000": {"mtu": 9000},
    "spoofCheck is 'no'": {"spoofCheck": "no"},
    "args.cni ": {"args": {"cni": []}},
}


@pytest.mark.parametrize("named", BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_named(node: Node, namespaces: Namespaces, named: str) -> None:
    answer = node.call("ADD", namespaces.new(), node.conf(**BAD_CONFIGURATIONS[named]))
    assert answer.body["code"] == 7
    assert named in answer.body["msg"] + " "
