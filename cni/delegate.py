"""Call another CNI plugin, as the spec's "plugin delegation" has it: same environment, same configuration.

The only place of `cni` that starts a process; the plugin is executed itself, never through a shell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cni.request import Request
from cni.result import CniError, Code, Result, parse_result

TIMEOUT_S = 90.0
"""Longer than the dhcp plugin waits for its server."""

_STDERR_CHARACTERS = 500


def call(name: str, request: Request, command: str = "") -> Result | None:
    """Run plugin `name` of CNI_PATH for this request, or with another `command`.

    Its result if that is an ADD. Its failure is raised as it told it, with its name in front.
    """
    path = _find(name, request.path)
    env = {"PATH": os.defpath} | dict(request.env or {}) | {"CNI_COMMAND": command or request.command}
    try:
        done = subprocess.run(  # noqa: S603 (an absolute path that the caller's CNI_PATH leads to)
            [path],
            input=json.dumps(request.config),
            capture_output=True,
            text=True,
            env=env,
            check=False,
            timeout=TIMEOUT_S,
        )
    except (OSError, ValueError) as error:
        raise CniError(Code.IO_FAILURE, f"IPAM plugin {name} cannot be run: {error}") from None
    except subprocess.TimeoutExpired:
        raise CniError(
            Code.TRY_AGAIN_LATER, f"IPAM plugin {name} did not end within {TIMEOUT_S:.0f} s"
        ) from None
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise _failure(name, done)
    return _result(name, done.stdout) if env["CNI_COMMAND"] == "ADD" else None


def _find(name: str, directories: tuple[str, ...]) -> Path:
    for directory in directories:
        path = Path(directory) / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise CniError(
        Code.INVALID_CONFIG, f"ipam.type is {name!r}: no such plugin in CNI_PATH {':'.join(directories)!r}"
    )


def _result(name: str, stdout: str) -> Result:
    body = _object(stdout)
    if body is None:
        raise CniError(Code.DECODE_FAILURE, f"IPAM plugin {name} printed no result", stdout[:200])
    return parse_result(body)


def _failure(name: str, done: subprocess.CompletedProcess[str]) -> CniError:
    body = _object(done.stdout) or {}
    code, text = body.get("code"), body.get("msg")
    known = {int(item) for item in Code}
    return CniError(
        Code(code) if code in known else Code.DELEGATE_FAILED,
        f"IPAM plugin {name}: {text or f'failed with exit status {done.returncode}'}",
        str(body.get("details") or done.stderr.strip()[-_STDERR_CHARACTERS:]),
    )


def _object(text: str) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
