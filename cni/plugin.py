"""One CNI call from the plugin's side: hand it to the daemon, or do what can be done without one.

A runtime starts this process for every call, so only the standard library's cheapest parts are imported
on the way to the daemon; everything else is imported where it is needed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import IO

from forwarder.control.messages import (
    DEFAULT_RUN_DIR,
    MAX_LINE_BYTES,
    SOCKET_NAME,
    MessageError,
    Request,
    decode_response,
    encode_request,
)

DEFAULT_STATE_DIR = "/var/lib/podloom"
DEADLINE_S = 60.0
"""For the daemon's whole answer; runtimes give a CNI call some minutes."""

_ABOUT = "podloom-cni: the CNI plugin of podloom, called by a container runtime. CNI versions: {}\n"
_SERVED_BY_DAEMON = frozenset({"ADD", "DEL", "CHECK", "GC", "STATUS"})


class DaemonAwayError(Exception):
    """No usable answer came from the daemon; the text says where and why."""


def run(environ: Mapping[str, str], stdin: IO[bytes] | None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one call."""
    env = {key: value for key, value in environ.items() if key.startswith("CNI_")}
    if not env:  # a person, not a runtime
        from cni.result import VERSIONS

        return 0, "", _ABOUT.format(", ".join(VERSIONS))
    try:
        text = stdin.read() if stdin else b""
    except OSError as error:
        return _unreadable_stdin(error)
    config = _config(text)
    if config is None or env.get("CNI_COMMAND") not in _SERVED_BY_DAEMON:
        return *_answer_here(env, text, config or {}, ""), ""
    try:
        return *_ask_daemon(config, env, text.decode()), ""
    except DaemonAwayError as away:
        return *_answer_here(env, text, config, str(away)), ""


def _config(stdin: bytes) -> dict[str, object] | None:
    """The configuration, if there is one in `stdin`; what is wrong with it otherwise is told elsewhere."""
    try:
        config = json.loads(stdin.decode())
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _ask_daemon(config: Mapping[str, object], env: Mapping[str, str], stdin: str) -> tuple[int, str]:
    path = _string(config, "controlSocket", f"{DEFAULT_RUN_DIR}/{SOCKET_NAME}")
    try:
        request = encode_request(Request("cni", {"env": env, "stdin": stdin}))
        response = decode_response(_exchange(path, request))
    except (OSError, MessageError, ValueError) as error:
        raise DaemonAwayError(f"{path}: {error}") from None
    if response.error is not None:
        raise DaemonAwayError(f"{path}: {response.error}")
    try:
        exit_code, stdout = response.result["exit"], response.result["stdout"]
        return int(exit_code), str(stdout)
    except (KeyError, TypeError, ValueError):
        raise DaemonAwayError(f"{path}: the answer is not one to a CNI call") from None


def _exchange(path: str, request: bytes) -> bytes:
    """One line there, one line back."""
    import time

    until = time.monotonic() + DEADLINE_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(path)
        connection.sendall(request)
        answer = bytearray()
        while not answer.endswith(b"\n"):
            connection.settimeout(max(until - time.monotonic(), 0.001))
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError("the daemon closed the connection before it answered")
            answer += part
            if len(answer) > MAX_LINE_BYTES:
                raise MessageError(f"an answer of more than {MAX_LINE_BYTES} bytes")
    return bytes(answer)


def _answer_here(
    env: Mapping[str, str], stdin: bytes, config: Mapping[str, object], away: str
) -> tuple[int, str]:
    """The call without the daemon: faults are told and all but ADD done on the same store."""
    from cni.request import parse
    from cni.result import CniError, Code, error_json, version_json

    try:
        request = parse(env, stdin)
        if request.command == "VERSION":
            return 0, version_json(request.version)
        if request.command == "ADD":
            raise CniError(
                Code.TRY_AGAIN_LATER,
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
        return service.handle(env, stdin.decode())
    finally:
        service.close()


def _unreadable_stdin(error: OSError) -> tuple[int, str, str]:
    from cni.result import CniError, Code, error_json

    return 1, error_json(CniError(Code.IO_FAILURE, f"stdin cannot be read: {error}")), ""


def _string(config: Mapping[str, object], key: str, default: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) and value else default
