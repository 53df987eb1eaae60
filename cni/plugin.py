"""One CNI call from the plugin's side: hand it to the daemon, or do what can be done without one.

What only a call without the daemon needs is imported there; annotations are strings for the same reason,
which `cni.client` explains.
"""

import time

from cni import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

DEFAULT_STATE_DIR = "/var/lib/podloom"
STDIN_LIMIT = 512 << 10
"""Bytes, as cni.request.STDIN_LIMIT: what is longer is not read to its end."""

_ABOUT = "podloom-cni: the CNI plugin of podloom, called by a container runtime. CNI versions: {}\n"
_SERVED_BY_DAEMON = frozenset({"ADD", "DEL", "CHECK", "GC", "STATUS"})


def run(environ: "Mapping[str, str]", stdin: "IO[bytes] | None") -> "tuple[int, str, str]":
    """(exit code, stdout, stderr) of one call."""
    began_at = time.clock_gettime(time.CLOCK_BOOTTIME)
    env = dict(environ)  # all of it, because an IPAM plugin is to have its caller's
    if not any(key.startswith("CNI_") for key in env):  # a person, not a runtime
        from cni.result import VERSIONS

        return 0, "", _ABOUT.format(", ".join(VERSIONS))
    try:
        raw = stdin.read(STDIN_LIMIT + 1) if stdin else b""
    except OSError as error:
        return _unreadable_stdin(error)
    text, config, away = _decoded(raw), None, ""
    if text is not None and env.get("CNI_COMMAND") in _SERVED_BY_DAEMON:
        config = client.parse_object(text)
    if text is not None and config is not None:
        path = _string(config, "controlSocket", client.DEFAULT_SOCKET)
        try:
            return *client.ask(path, env, text, began_at), ""
        except client.DaemonAwayError as error:
            away = str(error)
    return *_answer_here(env, raw, config or {}, away, began_at), ""


def _decoded(stdin: bytes) -> "str | None":
    try:
        return stdin.decode() if len(stdin) <= STDIN_LIMIT else None
    except UnicodeDecodeError:
        return None


def _answer_here(
    env: "Mapping[str, str]", stdin: bytes, config: "Mapping[str, object]", away: str, began_at: float
) -> "tuple[int, str]":
    """The call without the daemon: faults are told and all but ADD done on the same store."""
    from cni.request import parse
    from cni.result import CniError, Code, error_json, version_json

    codes = {"ADD": Code.TRY_AGAIN_LATER, "STATUS": Code.LIMITED_CONNECTIVITY}
    try:
        request = parse(env, stdin)
        if request.command == "VERSION":
            return 0, version_json(request.version)
        if request.command in codes:
            raise CniError(
                codes[request.command],
                "the podloom daemon does not answer; start it with `podloom up`",
                away,
                request.version,
            )
    except CniError as error:
        return 1, error_json(error)
    from pathlib import Path

    from cni.service import CniService

    service = CniService(None, Path(_string(config, "stateDir", DEFAULT_STATE_DIR)))
    try:
        return service.handle(env, stdin.decode(), began_at)
    finally:
        service.close()


def _unreadable_stdin(error: OSError) -> "tuple[int, str, str]":
    from cni.result import CniError, Code, error_json

    return 1, error_json(CniError(Code.IO_FAILURE, f"stdin cannot be read: {error}")), ""


def _string(config: "Mapping[str, object]", key: str, default: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) and value else default
