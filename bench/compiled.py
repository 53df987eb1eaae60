"""Cython beside the benchmarks, compiled when it is asked for and never installed.

It uses fastpath's own .pxd files from outside, as any other project could.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from Cython.Build import cythonize
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVES = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True}
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-DNDEBUG"]


def install(name: str) -> None:
    """Compile the module's .pyx into a directory that is gone again, so that `import NAME` finds it."""
    if name in sys.modules:
        return
    with tempfile.TemporaryDirectory(prefix="podloom-bench-") as directory:
        library = _build(name, Path(directory))
        specification = importlib.util.spec_from_file_location(name, library)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    setattr(importlib.import_module(package), last, module)


def translate(name: str, directory: Path) -> list[Extension]:
    """Cython to C, into `directory`. Cython.Compiler.Errors.CompileError if it no longer fits fastpath."""
    source = ROOT.joinpath(*name.split(".")).with_suffix(".pyx")
    extensions: list[Extension] = cythonize(
        [Extension(name, [str(source)], extra_compile_args=CFLAGS)],
        include_path=[str(ROOT)],
        build_dir=str(directory / "c"),
        compiler_directives=DIRECTIVES,
        quiet=True,
    )
    return extensions


def _build(name: str, directory: Path) -> Path:
    distribution = Distribution({"name": "bench", "ext_modules": translate(name, directory)})
    command = distribution.get_command_obj("build_ext")
    command.build_lib = str(directory / "lib")
    command.build_temp = str(directory / "objects")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(name))


def compiler_of(module: ModuleType) -> str | None:
    """The compiler and flags an extension was built with, by its debug information; None if it has none."""
    assert module.__file__ is not None
    command = ["readelf", "--debug-dump=info", "--dwarf-depth=1", module.__file__]
    try:
        dump = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    for line in dump.stdout.splitlines():
        if "DW_AT_producer" in line:
            return line.partition("): ")[2].strip()
    return None


def is_unoptimised(compiler: str) -> bool:
    """Whether the last -O of a compiler's flags is one that no figure should come from. Not every compiler
    records its flags; PODLOOM_DEBUG's do."""
    levels = [flag for flag in compiler.split() if flag.startswith("-O")]
    return bool(levels) and levels[-1] in ("-O0", "-Og")
