"""Modules are what they seem: compiled where they should be, importable alone, true to their stubs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, module_name, python_files


def extensions() -> list[str]:
    """EXTENSIONS of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTENSIONS":
            return list(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no EXTENSIONS")


def test_every_extension_source_is_built() -> None:
    sources = {module_name(path) for path in (ROOT / "fastpath").rglob("*.pyx")}
    assert sources == set(extensions())


@pytest.mark.parametrize("name", extensions())
def test_extensions_are_loaded_compiled(name: str) -> None:
    loaded = importlib.import_module(name).__file__
    assert loaded is not None
    assert loaded.endswith(tuple(EXTENSION_SUFFIXES))
    assert not (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), "no pure-Python fallback"


def stubs() -> list[str]:
    return sorted(module_name(path) for path in (ROOT / "fastpath").rglob("*.pyi"))


def test_every_stub_is_an_extensions() -> None:
    assert set(stubs()) <= set(extensions())


@pytest.mark.parametrize("name", stubs())
def test_stubs_name_what_is_there(name: str) -> None:
    stub = (ROOT / name.replace(".", "/")).with_suffix(".pyi")
    module = importlib.import_module(name)
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef):
            cls = getattr(module, node.name)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    assert hasattr(cls, member.name), f"{node.name}.{member.name}"
                elif isinstance(member, ast.AnnAssign | ast.Assign):
                    target = member.target if isinstance(member, ast.AnnAssign) else member.targets[0]
                    assert hasattr(cls, ast.unparse(target)), f"{node.name}.{ast.unparse(target)}"
        elif isinstance(node, ast.FunctionDef):
            assert callable(getattr(module, node.name))
        elif isinstance(node, ast.AnnAssign):
            assert hasattr(module, ast.unparse(node.target))


def importable() -> list[str]:
    """Every module that is not declarations only. Importing a `__main__` too must do nothing."""
    names = {module_name(path) for path in python_files("fastpath", "forwarder", "cni")}
    return sorted(names | set(extensions()))


@pytest.mark.parametrize("name", importable())
def test_every_module_can_be_the_first_to_be_imported(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {name}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_git_holds_no_build_output() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of files is NOT tested in this run")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    generated = {".c", ".cpp", ".html", ".so", ".o", ".pyc"}
    by_hand = {"tests/pipeline/refusals.c"}
    assert {name for name in listed.stdout.splitlines() if Path(name).suffix in generated} == by_hand
