"""The plugin's way to the daemon: one line of JSON there, one back.

A runtime starts the plugin for every call, and importing json and socket takes as long as starting Python.
So their C parts are used by themselves here, nothing else is imported, not even for annotations' sake, and
what `forwarder.control.messages` says of the protocol is repeated. Tests hold all of that.
"""

import _json
import _socket

DEFAULT_SOCKET = "/run/podloom/control.sock"
REQUEST_BYTES_MAX = 1 << 20
ANSWER_BYTES_MAX = 1 << 20
DEADLINE_S, STATUS_DEADLINE_S = 60.0, 2.0
"""For each part of the daemon's answer. Runtimes give a CNI call some minutes, and ask STATUS every few
seconds."""


class DaemonAwayError(Exception):
    """No usable answer came from the daemon; the text says where and why."""


class _Standard:
    """What json.JSONDecoder tells its scanner."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


_scan = _json.make_scanner(_Standard())  # type: ignore[arg-type]
_quoted = _json.encode_basestring_ascii


def parse_object(text: str) -> "dict[str, object] | None":
    """The JSON object that is all of `text`, or None."""
    text = text.strip(" \t\r\n")
    try:
        value, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError, SystemError):
        # Up to Python 3.11 the scanner cannot raise its error where json.decoder is not imported.
        return None
    return value if isinstance(value, dict) and end == len(text) else None


def encode_call(env: "dict[str, str]", stdin: str, began_at: float) -> bytes:
    """The request `cni` of the control protocol; `began_at` as in cni.service."""
    variables = ",".join(f"{_quoted(key)}:{_quoted(value)}" for key, value in env.items())
    args = f'{{"env":{{{variables}}},"stdin":{_quoted(stdin)},"began_at":{began_at!r}}}'
    return f'{{"verb":"cni","args":{args}}}\n'.encode()


def ask(path: str, env: "dict[str, str]", stdin: str, began_at: float) -> "tuple[int, str]":
    """(exit code, stdout) as the daemon has them; DaemonAwayError otherwise."""
    request = encode_call(env, stdin, began_at)
    if len(request) > REQUEST_BYTES_MAX:
        raise DaemonAwayError(f"{path}: a call of {len(request)} bytes; at most {REQUEST_BYTES_MAX}")
    try:
        deadline = STATUS_DEADLINE_S if env.get("CNI_COMMAND") == "STATUS" else DEADLINE_S
        line = _exchange(path, request, deadline).decode()
    except (OSError, ValueError) as error:
        raise DaemonAwayError(f"{path}: {error}") from None
    answer = parse_object(line)
    result = answer.get("result") if answer is not None else None
    if answer is not None and isinstance(answer.get("error"), str):
        raise DaemonAwayError(f"{path}: {answer['error']}")
    if not isinstance(result, dict):
        raise DaemonAwayError(f"{path}: the answer is not one to a CNI call")
    exit_code, stdout = result.get("exit"), result.get("stdout")
    if not (isinstance(exit_code, int) and isinstance(stdout, str)):
        raise DaemonAwayError(f"{path}: the answer is not one to a CNI call")
    return exit_code, stdout


def _exchange(path: str, request: bytes, deadline_s: float) -> bytes:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline_s)
        connection.connect(path)
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"\n"):
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError("the daemon closed the connection before it answered")
            answer += part
            if len(answer) > ANSWER_BYTES_MAX:
                raise ConnectionError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        return answer
    finally:
        connection.close()
