"""What deploy/ promises a cluster, held to what the commands, defaults and sources are."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml

from cni.install import CONFLIST, PLUGIN
from forwarder import cli, config
from forwarder.control.messages import DEFAULT_RUN_DIR
from forwarder.discovery.kube_client import NODES
from forwarder.names.kubernetes import SERVICES_PATH, SLICES_PATH
from forwarder.names.options import NamesConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"


def documents() -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / "podloom.yaml").read_text()) if document]


def only(kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    return dict(only("DaemonSet")["spec"]["template"]["spec"])


def containers() -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in (*pod()["initContainers"], *pod()["containers"])}


def test_what_there_is_and_how_it_belongs_together() -> None:
    kinds = [document["kind"] for document in documents()]
    assert kinds == [
        *("Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet")
    ]
    for document in documents():
        assert document["metadata"]["name"] == "podloom"
        if document["kind"] in ("ServiceAccount", "ConfigMap", "DaemonSet"):
            assert document["metadata"]["namespace"] == only("Namespace")["metadata"]["name"]
    binding = only("ClusterRoleBinding")
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": only("ClusterRole")["metadata"]["name"],
    }
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": pod()["serviceAccountName"], "namespace": "podloom"}
    template = only("DaemonSet")["spec"]["template"]
    assert only("DaemonSet")["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]


def test_the_rights_are_those_that_are_used_and_no_others() -> None:
    """Nodes are read, and our own gets annotations and a condition through its status; services are read."""
    rights = {
        (group, resource, verb)
        for rule in only("ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    for collection in (NODES, SERVICES_PATH, SLICES_PATH):
        group, _, resource = collection.removeprefix("/api/v1/").removeprefix("/apis/").rpartition("/")
        assert {(group.partition("/")[0], resource, verb) for verb in ("list", "watch")} <= rights
    assert rights == {
        *(("", "nodes", verb) for verb in ("get", "list", "watch")),
        ("", "nodes/status", "patch"),
        *(("", "services", verb) for verb in ("list", "watch")),
        *(("discovery.k8s.io", "endpointslices", verb) for verb in ("list", "watch")),
    }


def test_volumes_and_mounts_agree() -> None:
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    mounted = {mount["name"] for one in containers().values() for mount in one["volumeMounts"]}
    assert mounted == set(volumes)
    daemon = {mount["name"]: mount["mountPath"] for mount in containers()["podloom"]["volumeMounts"]}
    for name, path in (("run", DEFAULT_RUN_DIR), ("state", str(default_of(config.NodeConfig, "state_dir")))):
        assert daemon[name] == volumes[name]["hostPath"]["path"] == path
    installer = {mount["name"]: mount["mountPath"] for mount in containers()["install"]["volumeMounts"]}
    for name, path in installer.items():
        assert path == "/host" + volumes[name]["hostPath"]["path"]


def default_of(section: type, name: str) -> Any:
    return section.__dataclass_fields__[name].default  # type: ignore[attr-defined]


def test_entry_points_are_in_the_image_and_words_are_commands() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = {
        Path(word).name for line in re.findall(r"^COPY .*", dockerfile, re.MULTILINE) for word in line.split()
    }
    for one in containers().values():
        (script,) = one["command"]
        assert Path(script).name in copied
        assert os.access(DEPLOY / Path(script).name, os.X_OK)
    for probe in ("readinessProbe", "livenessProbe"):
        program, *words = containers()["podloom"][probe]["exec"]["command"]
        assert program == "podloom"
        assert cli.build_parser(words).parse_args(words).verb == "status"
    called = [words for name in ("install.sh", "up.sh") for words in calls_in(DEPLOY / name)]
    assert [words[0] for words in called] == ["cni", "up"]
    for words in called:
        cli.build_parser(words).parse_args(words)


def calls_in(script: Path) -> Iterator[list[str]]:
    """The words that a script gives podloom."""
    text = script.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if match := re.search(r"exec (podloom|\S+ -m forwarder) (.*)", line):
            yield shlex.split(match[2])


def test_the_image_is_built_from_all_there_is() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert all((ROOT / source).exists() for source in sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= set(sources)


def test_the_kustomization_names_what_is_there() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert all((DEPLOY / resource).exists() for resource in kustomization["resources"])
    (image,) = kustomization["images"]
    assert {one["image"] for one in containers().values()} == {image["name"]}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image["newTag"] == version


@pytest.mark.parametrize("addresses", ["192.0.2.7", "192.0.2.7,2001:db8::7"])
def test_the_daemon_gets_a_sound_configuration(tmp_path: Path, addresses: str) -> None:
    """up.sh itself runs, with a `podloom` that tells what it was asked."""
    (tmp_path / "template").write_text(only("ConfigMap")["data"]["podloom.toml"])
    told = tmp_path / "podloom"
    told.write_text('#!/bin/sh\necho "$@"\n')
    told.chmod(0o755)
    made = tmp_path / "etc" / "podloom.toml"
    done = subprocess.run(
        [DEPLOY / "up.sh"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "HOST_IPS": addresses,
            "TEMPLATE": str(tmp_path / "template"),
            "CONFIG": str(made),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"up -c {made}\n"
    parsed = config.load(made)
    assert parsed.node.endpoints == tuple(map(ip_address, addresses.split(",")))
    assert parsed.discovery.source == "kubernetes"
    assert parsed.names == NamesConfig(), "the cluster has a DNS of its own"
    assert {one["name"] for one in containers()["podloom"]["env"]} == {"HOST_IPS", "NODE_NAME"}


def test_without_addresses_up_says_what_is_missing() -> None:
    done = subprocess.run(
        [DEPLOY / "up.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "HOST_IPS" in done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the image has at /opt/podloom/runtime: a Python with podloom in it, here of this machine's."""
    tree = tmp_path / "opt" / "podloom" / "runtime"
    stdlib, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    (tree / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), tree / "bin" / "python3")
    unneeded = shutil.ignore_patterns("site-packages", "test", "idlelib", "__pycache__", "config-*", "*.a")
    lib = tree / "lib" / stdlib.name
    shutil.copytree(stdlib, lib, ignore=unneeded)
    (lib / "site-packages").mkdir()
    for package in ("cni", "forwarder"):
        shutil.copytree(ROOT / package, lib / "site-packages" / package)
    shutil.copytree(packages / "pyroute2", lib / "site-packages" / "pyroute2")
    library = sysconfig.get_config_var("INSTSONAME")
    if library and (shared := Path(sysconfig.get_config_var("LIBDIR")) / library).exists():
        shutil.copy2(shared, tree / "lib" / library)
    return tree


@pytest.mark.usefixtures("root")
def test_the_installed_plugin_runs_on_a_host_with_nothing(tmp_path: Path, tree: Path) -> None:
    """A root directory without Python or a C library, and the plugin started there as a runtime does."""
    if shutil.which("patchelf") is None:
        pytest.skip("no patchelf: the runtime for hosts is NOT tested in this run")
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin", "HOST": str(tmp_path / "host"), "RUNTIME": str(tree)}
    subprocess.run(["sh", str(DEPLOY / "runtime.sh"), str(tree)], env=environment, check=True)
    for _ in range(2):  # an update is the same as the first time
        done = subprocess.run(
            [DEPLOY / "install.sh"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    host = tmp_path / "host"
    assert not [path.name for path in (host / str(tree)[1:]).parent.iterdir() if path.name != tree.name]
    conflist = json.loads((host / "etc/cni/net.d" / CONFLIST).read_text())
    assert conflist["plugins"][0]["type"] == PLUGIN
    done = subprocess.run(
        [CHROOT, str(host), f"/opt/cni/bin/{PLUGIN}"],
        env={"CNI_COMMAND": "VERSION"},
        input=json.dumps({"cniVersion": "1.0.0"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.1.0" in json.loads(done.stdout)["supportedVersions"]
    # What only a DEL without the daemon needs: the store and netlink.
    script = (
        f"import sys; sys.path += {site_packages(tree)!r}; import cni.service; print(cni.service.CniService)"
    )
    done = subprocess.run(
        [CHROOT, str(host), f"{tree}/bin/python3", "-IS", "-c", script],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def site_packages(tree: Path) -> list[str]:
    (found,) = tree.glob("lib/python3*/site-packages")
    return [str(found)]
