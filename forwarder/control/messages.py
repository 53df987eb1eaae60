"""The control socket's language: one JSON object a line, one answer for each request, in order.

Pure and standard library only: the CNI plugin imports this module at every start. Hence NamedTuple
and not dataclass, whose import alone costs as much as starting the interpreter.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

SOCKET_NAME: Final = "control.sock"
"""The socket's name in the daemon's run_dir."""

DEFAULT_RUN_DIR: Final = "/run/podloom"

MAX_LINE_BYTES: Final = 1 << 20
"""Longest request, newline included. A CNI call whose prevResult has some hundred interfaces stays below
64 KiB; what is longer is a mistake, or an attack on the daemon's memory."""

MAX_RESPONSE_BYTES: Final = 1 << 26
"""Longest response, newline included: what 100,000 peers need."""


class MessageError(ValueError):
    """A line that is not a request (or response) of this protocol; the text says why."""


class Request(NamedTuple):
    """`verb` is one of status, peers, drops, offload, names, reload, cni; `args` are the verb's own."""

    verb: str
    args: dict[str, Any]


class Response(NamedTuple):
    """Either `result` (any JSON value) or, when `error` is not None, a sentence saying what went wrong."""

    result: Any = None
    error: str | None = None


def encode_request(request: Request) -> bytes:
    return _line({"verb": request.verb, "args": request.args}, MAX_LINE_BYTES)


def encode_response(response: Response) -> bytes:
    if response.error is not None:
        return _line({"error": response.error}, MAX_RESPONSE_BYTES)
    return _line({"result": response.result}, MAX_RESPONSE_BYTES)


def decode_request(line: bytes) -> Request:
    """MessageError unless the line is {"verb": str, "args"?: object} and nothing else."""
    message = _object(line, MAX_LINE_BYTES)
    unknown = sorted(message.keys() - {"verb", "args"})
    if unknown:
        raise MessageError(f"unknown key {unknown[0]!r}; allowed: verb, args")
    verb, args = message.get("verb"), message.get("args", {})
    if not isinstance(verb, str):
        raise MessageError(f"verb = {verb!r}: must be a string")
    if not isinstance(args, dict):
        raise MessageError("args: must be an object")
    return Request(verb, args)


def decode_response(line: bytes) -> Response:
    """MessageError unless the line is {"result": any} or {"error": str}."""
    message = _object(line, MAX_RESPONSE_BYTES)
    if set(message) == {"result"}:
        return Response(result=message["result"])
    if set(message) == {"error"} and isinstance(message["error"], str):
        return Response(error=message["error"])
    raise MessageError("a response must hold either a result or an error string")


def _line(message: dict[str, Any], limit: int) -> bytes:
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > limit:
        raise MessageError(f"a message of {len(line)} bytes; allowed: at most {limit}")
    return line


def _object(line: bytes, limit: int) -> dict[str, Any]:
    if len(line) > limit:
        raise MessageError(f"a line of {len(line)} bytes; allowed: at most {limit}")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise MessageError("a message must be a JSON object")
    return message
