"""`ctr run --cni` and podman as our callers: their own CNI libraries, without Kubernetes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cni import cli, install
from tests.netns.conftest import node
from tests.netns.nodes import Node, until

__all__ = ["node"]  # the fixture

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

BUSYBOX = Path("/bin/busybox")
IMAGE = "docker.io/local/busybox:1"
SCRIPT = "/bin/busybox ip -o addr show dev eth0; /bin/busybox ping -c 1 -W 5 10.42.1.1"


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing or not BUSYBOX.exists():
        pytest.skip(f"no {', '.join(missing) or BUSYBOX}: this caller is NOT tested in this run")


def image(path: Path) -> None:
    """A docker archive with busybox alone."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("config.json", json.dumps(config).encode()),
            ("manifest.json", json.dumps(manifest).encode()),
            ("layer.tar", layer.getvalue()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def run(*words: str, seconds: float = 90) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout} {done.stderr}"
    return done.stdout


@contextmanager
def containerd(directory: Path) -> Iterator[Path]:
    """Its socket; state and configuration are this test's own."""
    socket, config = directory / "containerd.sock", directory / "containerd.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n'
    )
    with (directory / "containerd.log").open("w") as log:
        process = subprocess.Popen(["containerd", "-c", str(config)], stdout=log, stderr=log)
    try:
        until(socket.exists, "containerd", 20)
        yield socket
    finally:
        process.terminate()
        process.wait(20)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((mount for mount in mounts if mount.startswith(f"{directory}/")), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)


def assert_empty(node: Node) -> None:
    assert not [name for name in node.namespace.link_names() if name.startswith("pl")]
    assert cli.pods(node.directory / "state") == []


def test_ctr_run(node: Node, tmp_path: Path) -> None:
    """ctr looks in /opt/cni/bin and /etc/cni/net.d, which is why it gets mounts of its own."""
    needs("ctr", "containerd", "runc")
    if not Path("/etc/cni").is_dir():
        pytest.skip("no /etc/cni to mount over: ctr run --cni is NOT tested in this run")
    node.start()
    install.install(
        tmp_path / "opt" / "cni" / "bin",
        tmp_path / "etc" / "net.d",
        control_socket=str(node.control_socket),
        state_dir=str(node.directory / "state"),
    )
    image(tmp_path / "image.tar")
    with containerd(tmp_path) as socket:
        ctr = f"ctr -a {socket}"
        run(*ctr.split(), "images", "import", str(tmp_path / "image.tar"))
        mounts = f"mount --bind {tmp_path}/opt /opt && mount --bind {tmp_path}/etc /etc/cni"
        command = f"exec {ctr} run --rm --cni {IMAGE} podloom-{os.getpid()} /bin/busybox sh -c '{SCRIPT}'"
        seen = run(
            *("nsenter", f"--net={node.namespace.path}", "unshare", "-m"),
            *("sh", "-c", f"{mounts} && {command}"),
        )
    assert "10.42.1.2/32" in seen
    assert "fd42:0:0:1::2/128" in seen
    assert "1 packets received" in seen
    assert_empty(node)


def test_podman_run(node: Node, tmp_path: Path) -> None:
    needs("podman", "runc")
    node.start()
    for directory in ("bin", "net.d"):
        (tmp_path / directory).mkdir()
    install.install(
        tmp_path / "bin",
        tmp_path / "net.d",
        control_socket=str(node.control_socket),
        state_dir=str(node.directory / "state"),
    )
    configuration = tmp_path / "containers.conf"
    configuration.write_text(
        f'[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = ["{tmp_path}/bin"]\n'
        f'network_config_dir = "{tmp_path}/net.d"\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
        'events_logger = "none"\n[containers]\ndefault_ulimits = []\n'
    )
    rootfs = tmp_path / "rootfs"
    for directory in ("bin", "proc", "sys", "dev", "etc", "run"):
        (rootfs / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, rootfs / "bin" / "busybox")
    with tempfile.TemporaryDirectory(prefix="pl") as short:  # podman takes at most 50 characters
        done = podman(node, Path(short), configuration, rootfs)
    assert done.returncode == 0, done.stderr
    assert "10.42.1.2/32" in done.stdout
    assert "1 packets received" in done.stdout
    assert_empty(node)


def podman(node: Node, state: Path, configuration: Path, rootfs: Path) -> subprocess.CompletedProcess[str]:
    storage = ["--root", f"{state}/root", "--runroot", f"{state}/run", "--tmpdir", f"{state}/t"]
    return subprocess.run(
        [
            *("nsenter", f"--net={node.namespace.path}", "podman", *storage),
            *(
                "--storage-driver",
                "vfs",
                "run",
                "--rm",
                "--ulimit=host",
                "--network",
                "podloom",
            ),
            *("--rootfs", str(rootfs), "/bin/busybox", "sh", "-c", SCRIPT),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CONTAINERS_CONF": str(configuration), "HOME": "/root"},
    )
