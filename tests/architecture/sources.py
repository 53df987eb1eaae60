"""What each source file of the project imports, read from its text: nothing here is imported or run."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fastpath", "forwarder", "cni", "bench", "tests")

# `from a.b cimport c`, `from a.b import (`, `cimport a.b as c`, `import a, b`; at any indentation.
FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE)
PLAIN = re.compile(r"^[ \t]*c?import[ \t]+([^\n#(]+)", re.MULTILINE)
INCLUDE = re.compile(r"^[ \t]*include[ \t]+[\"']", re.MULTILINE)


def python_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def cython_files() -> list[Path]:
    return sorted(path for pattern in ("*.pyx", "*.pxd") for path in (ROOT / "fastpath").rglob(pattern))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> frozenset[str]:
    """Every module and package of the project by its dotted name."""
    return frozenset(module_name(path) for path in (*python_files(*PACKAGES), *cython_files()))


def imports_of(path: Path) -> frozenset[str]:
    """Dotted names of what the file imports or cimports; a name out of a package counts as its module."""
    text = path.read_text()
    pairs = _cython_pairs(text) if path.suffix in (".pyx", ".pxd") else _python_pairs(text, module_name(path))
    found = set()
    for module, name in pairs:
        whole = f"{module}.{name}" if name else module
        found.add(whole if whole in modules() else module)
    return frozenset(found)


def _cython_pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for module, names in FROM.findall(text):
        listed = re.sub(r"#[^\n]*|[()]", "", names).split(",")
        pairs += [(module, name.split()[0]) for name in listed if name.split()]
    for names in PLAIN.findall(text):
        pairs += [(name.split()[0], "") for name in names.split(",") if name.split()]
    return pairs


def _python_pairs(text: str, importer: str) -> list[tuple[str, str]]:
    pairs = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: write imports from the top, not relative ones"
            assert node.module is not None
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


def names_from(path: Path, module: str) -> frozenset[str]:
    """What a Cython file takes out of one module."""
    return frozenset(name for origin, name in _cython_pairs(path.read_text()) if origin == module)


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
