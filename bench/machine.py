"""What figures were measured on and with: they mean nothing without it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastpath.pump
from bench.compiled import ROOT, compiler_of, is_unoptimised

# program -> how it tells its version
_PROGRAMS = {
    "iperf3": ("--version",),
    "ip": ("-Version",),
    "ovs-vswitchd": ("--version",),
    "wireguard-go": ("--version",),
}


class UnfitBuildError(Exception):
    """Figures from this build would mislead; the message says why."""


def refuse_unfit_build() -> None:
    """Raise UnfitBuildError for a debug build, or one that is not the checkout's whose benchmarks run."""
    compiler = compiler_of(fastpath.pump)
    if compiler is not None and is_unoptimised(compiler):
        raise UnfitBuildError(
            f"fastpath is a debug build (built by {compiler}): build it anew without PODLOOM_DEBUG"
        )
    loaded = Path(str(fastpath.pump.__file__)).resolve()
    if not loaded.is_relative_to(ROOT):
        raise UnfitBuildError(f"fastpath was loaded from {loaded.parent}, which is not of this checkout")


def describe() -> dict[str, Any]:
    """Kernel, CPUs, versions, commit and the flags that fastpath was built with."""
    return {
        "kernel": f"{platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "cython": version("cython"),
        "compiler": compiler_of(fastpath.pump) or "unknown: no debug information",
        "commit": _commit(),
    }


def program_versions() -> dict[str, str]:
    """First lines of what the installed programs say of themselves."""
    found = {}
    for program, arguments in _PROGRAMS.items():
        if shutil.which(program):
            done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
            said = (done.stdout or done.stderr).strip().splitlines()
            found[program] = said[0] if said else "unknown"
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, "-dirty" behind it if the checkout is not what was committed."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
