"""The import rule of ARCHITECTURE.md, and within fastpath the order of its layers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import (
    INCLUDE,
    PACKAGES,
    ROOT,
    belongs_to,
    cython_files,
    imports_of,
    module_name,
    names_from,
    python_files,
)

LEAVES = {"linux", "drops"}

# part of fastpath: what it may import of fastpath beside itself
LAYERS = {
    "linux": set[str](),
    "drops": set[str](),
    "wire": LEAVES,
    "offload": LEAVES | {"wire"},
    "table": LEAVES | {"wire"},
    "kernel": LEAVES,
    "probes": LEAVES | {"wire"},
    "spin": set(),
    "sender": LEAVES | {"wire", "offload", "table", "kernel"},
    "writer": LEAVES | {"wire", "offload", "table", "kernel"},
    "pump": LEAVES | {"wire", "offload", "table", "kernel", "probes", "spin", "sender", "writer"},
}

# What reaches a socket, a file, another process or a clock.
IMPURE = {
    "asyncio",
    "ctypes",
    "datetime",
    "fcntl",
    "http",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "pyroute2",
    "pytun",
    "random",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "uuid",
    "uvloop",
}

# pure module: what its one impure function (`config.load`) may use all the same
PURE: dict[str, set[str]] = {
    "forwarder.bfd": set(),
    "forwarder.bulk": set(),
    "forwarder.config": {"pathlib"},
    "forwarder.health": set(),
    "forwarder.path_search": set(),
    "forwarder.peers": set(),
    "forwarder.probe": set(),
    "forwarder.roaming": set(),
    "forwarder.reconcile": set(),
    "forwarder.routes": set(),
    "forwarder.rtnetlink": set(),
    "forwarder.legs": set(),
    "forwarder.underlay": set(),
    "forwarder.control.messages": set(),
    "forwarder.names.cache": set(),
    "forwarder.names.etcd": set(),
    "forwarder.names.kubernetes": set(),
    "forwarder.names.limits": set(),
    "forwarder.names.options": set(),
    "forwarder.names.pods": set(),
    "forwarder.names.records": set(),
    "forwarder.names.servers": set(),
    "forwarder.names.settings": set(),
    "forwarder.names.wire": set(),
    "forwarder.names.zone": set(),
    "cni.guard": {"sys"},  # for the byte order
    "cni.ipam": set(),
    "cni.netconf": set(),
    "cni.request": set(),
    "cni.result": set(),
    "cni.rtnetlink": {"socket", "sys"},  # for the families' numbers and the byte order
}

FASTPATH = [*cython_files(), *python_files("fastpath")]
PYTHON = python_files("forwarder", "cni")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_project(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}


def part_of(module: str) -> str:
    """fastpath.wire.geneve -> wire"""
    return module.split(".")[1]


@pytest.mark.parametrize("path", FASTPATH, ids=relative)
class TestFastpath:
    def test_imports_no_other_package_of_the_project(self, path: Path) -> None:
        assert {name for name in of_project(path) if not belongs_to(name, "fastpath")} == set()

    def test_imports_only_layers_below_it(self, path: Path) -> None:
        if module_name(path) == "fastpath":
            return  # the package itself: the public names
        part = part_of(module_name(path))
        imported = {part_of(name) for name in of_project(path) if name != "fastpath"} - {part}
        assert imported <= LAYERS[part], f"{part} may import {sorted(LAYERS[part])}"

    def test_includes_no_other_file(self, path: Path) -> None:
        assert not INCLUDE.search(path.read_text()), "a file that is included cannot be read alone"

    def test_only_the_edge_makes_system_calls(self, path: Path) -> None:
        if path.suffix == ".py" or belongs_to(module_name(path), "fastpath.kernel"):
            return
        assert names_from(path, "fastpath.linux") & system_calls() == set()


def system_calls() -> set[str]:
    """Functions that linux.pxd declares; CMSG_* are macros that only reckon."""
    text = (ROOT / "fastpath" / "linux.pxd").read_text()
    return {name for name in re.findall(r"(\w+)\(", text) if not name.startswith("CMSG_")}


def test_the_system_calls_are_seen() -> None:
    assert {"ioctl", "read", "recvmmsg", "sendmmsg", "writev"} <= system_calls()


def test_every_part_of_fastpath_has_its_place() -> None:
    parts = {part_of(module_name(path)) for path in FASTPATH if module_name(path) != "fastpath"}
    assert parts == set(LAYERS)


@pytest.mark.parametrize("path", PYTHON, ids=relative)
class TestPackages:
    def test_only_the_data_plane_imports_fastpath(self, path: Path) -> None:
        if module_name(path) not in {"forwarder.dataplane", "forwarder.uplink"}:
            assert not [name for name in of_project(path) if belongs_to(name, "fastpath")]

    def test_only_the_daemon_and_its_own_commands_import_cni(self, path: Path) -> None:
        module = module_name(path)
        if not belongs_to(module, "cni") and module != "forwarder.daemon":
            allowed = {"cni.cli"} if module == "forwarder.cli" else set()
            assert {name for name in of_project(path) if belongs_to(name, "cni")} <= allowed

    def test_cni_imports_only_the_messages(self, path: Path) -> None:
        if belongs_to(module_name(path), "cni"):
            others = {name for name in of_project(path) if not belongs_to(name, "cni")}
            assert others <= {"forwarder.control.messages"}

    def test_the_demo_drives_from_outside(self, path: Path) -> None:
        if belongs_to(module_name(path), "forwarder.demo"):
            assert not [name for name in of_project(path) if not belongs_to(name, "forwarder.demo")]

    def test_nothing_imports_tests_or_bench(self, path: Path) -> None:
        assert not [name for name in of_project(path) if name.split(".")[0] in ("tests", "bench")]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_reaches_nothing_outside(module: str) -> None:
    """Neither does any module of the project that it imports."""
    paths = {module_name(path): path for path in PYTHON}
    seen, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in paths:
            continue
        seen.add(name)
        imported = imports_of(paths[name])
        impure = {other for other in imported if other.split(".")[0] in IMPURE} - PURE.get(name, set())
        assert not impure, f"{name} imports {sorted(impure)}"
        waiting += [other for other in imported if other.split(".")[0] in PACKAGES]


@pytest.mark.parametrize("part", ["wire", "offload"])
def test_the_pure_layers_reach_nothing_outside(part: str) -> None:
    for path in FASTPATH:
        if belongs_to(module_name(path), f"fastpath.{part}"):
            assert not {name for name in imports_of(path) if name.split(".")[0] in IMPURE | {"posix"}}, path


def test_the_messages_are_made_of_the_standard_library() -> None:
    imported = imports_of(ROOT / "forwarder" / "control" / "messages.py")
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize("package", ["forwarder", "forwarder/control"])
def test_packages_on_cnis_way_cost_nothing(package: str) -> None:
    """cni imports forwarder.control.messages, so these run at each start of the plugin."""
    assert imports_of(ROOT / package / "__init__.py") == frozenset()


def test_the_plugin_starts_without_what_is_slow_to_import() -> None:
    slow = {"asyncio", "fastpath", "logging", "pyroute2", "pytun", "rich", "sqlite3", "uvloop"}
    script = "import sys, cni.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert slow & set(run.stdout.split()) == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from fastpath.drops cimport DROP_NONE", {"fastpath.drops"}),
        ("from fastpath.wire.geneve cimport (  # codec\n    encode,\n)", {"fastpath.wire.geneve"}),
        ("from fastpath.wire cimport geneve, vxlan", {"fastpath.wire.geneve", "fastpath.wire.vxlan"}),
        ("cimport fastpath.table as t", {"fastpath.table"}),
        ("import os, socket", {"os", "socket"}),
        ("def f():\n    import socket  # late\n", {"socket"}),
        ("# from fastpath.pump cimport Pump", set()),
        ('"""from here on import nothing"""', set()),
    ],
)
def test_the_reader_of_cython_imports(tmp_path: Path, text: str, found: set[str]) -> None:
    path = tmp_path / "sample.pyx"
    path.write_text(text)
    assert imports_of(path) == found
