"""Place the plugin and its configuration where a container runtime looks, and take them away again.

Runtimes watch the configuration directory and start plugins at any moment, so each file appears whole, and
the configuration last. The plugin is a launcher, so that Python starts without its `site` module.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cni.client import DEFAULT_SOCKET
from cni.plugin import DEFAULT_STATE_DIR
from cni.result import VERSIONS

PLUGIN = "podloom-cni"
CONFLIST = "10-podloom.conflist"
CNI_VERSION = "1.0.0"
"""What runtimes in use understand: those that know 1.1.0 take it from cniVersions."""

_SHEBANG_MAX = 255  # BINPRM_BUF_SIZE less the newline, linux/binfmts.h
_LAUNCHER = """#!{python} -IS
# Made by `podloom cni install`: -I and -S halve the time that Python takes to start, and nothing is open
# that it would have to tidy up.
import posix, sys

sys.path += {path!r}
from cni.__main__ import main

posix._exit(main())
"""


class InstallError(Exception):
    """Nothing was changed that matters; the text says what cannot be done and why."""


def install(
    bin_dir: Path,
    conf_dir: Path,
    *,
    network: str = "podloom",
    control_socket: str = DEFAULT_SOCKET,
    state_dir: str = DEFAULT_STATE_DIR,
) -> list[Path]:
    """The files it wrote: the plugin, then the configuration that makes runtimes use it."""
    plugin, conflist = bin_dir / PLUGIN, conf_dir / CONFLIST
    for path in (plugin, conflist):
        _refuse_foreign(path)
    chained = [name for name in ("portmap", "bandwidth") if os.access(bin_dir / name, os.X_OK)]
    _write(plugin, launcher(), 0o755)
    _write(conflist, configuration(network, control_socket, state_dir, chained), 0o644)
    for left in (*_unfinished(plugin), *_unfinished(conflist)):
        _unlink(left)
    return [plugin, conflist]


def uninstall(bin_dir: Path, conf_dir: Path) -> list[Path]:
    """The files it removed: the configuration first, so that no runtime looks for the plugin."""
    paths = [conf_dir / CONFLIST, bin_dir / PLUGIN]
    for path in paths:
        _refuse_foreign(path)
    return [path for whole in paths for path in (whole, *_unfinished(whole)) if _unlink(path)]


def launcher() -> str:
    """The plugin's text. It finds our packages and those we need where this interpreter finds them."""
    text = _LAUNCHER.format(python=sys.executable, path=_search_path())
    first = text.partition("\n")[0]
    if any(char.isspace() for char in sys.executable) or len(first) > _SHEBANG_MAX:
        raise InstallError(f"a script cannot name {sys.executable}: install podloom on a short path")
    return text


def configuration(network: str, control_socket: str, state_dir: str, chained: list[str]) -> str:
    """The conflist; what is at its default is left out."""
    ours: dict[str, Any] = {"type": PLUGIN, "capabilities": {"ips": True, "mac": True, "dns": True}}
    if control_socket != DEFAULT_SOCKET:
        ours["controlSocket"] = control_socket
    if state_dir != DEFAULT_STATE_DIR:
        ours["stateDir"] = state_dir
    others: Mapping[str, dict[str, Any]] = {
        "portmap": {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}},
        "bandwidth": {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    }
    body = {
        "cniVersion": CNI_VERSION,
        "cniVersions": [version for version in VERSIONS if version >= "0.4.0"],
        "name": network,
        "plugins": [ours, *(others[name] for name in chained)],
    }
    return json.dumps(body, indent=2) + "\n"


def _search_path() -> list[str]:
    """Where our packages are, and then the rest of sys.path that is not the interpreter's own."""
    own = str(Path(__file__).resolve().parents[1])
    rest = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return list(dict.fromkeys([own, *rest]))


def _refuse_foreign(path: Path) -> None:
    try:
        if stat.S_ISREG(path.lstat().st_mode) and "podloom" in path.read_text(errors="replace"):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise InstallError(f"{path} cannot be read: {error.strerror}") from None
    raise InstallError(f"{path} exists and was not made by podloom: move it away first")


def _unfinished(path: Path) -> list[Path]:
    """What installs that were killed left beside `path`."""
    return sorted(path.parent.glob(f".{path.name}.*"))


def _unlink(path: Path) -> bool:
    """Whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InstallError(f"{path} cannot be removed: {error.strerror}") from None
    return True


def _write(path: Path, text: str, mode: int) -> None:
    """Replace `path` in one step, durably; a process that runs the old file goes on with it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w") as file:
                file.write(text)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise InstallError(f"{path} cannot be written: {error.strerror}") from None
