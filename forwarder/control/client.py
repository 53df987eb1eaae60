"""Asks a running daemon, for the command line. Blocking, with a deadline."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from forwarder.control.messages import (
    MAX_RESPONSE_BYTES,
    MessageError,
    Request,
    decode_response,
    encode_request,
)

TIMEOUT_SECONDS: Final = 10.0


class ControlError(RuntimeError):
    """No answer, or an answer that is an error; the text says what to do."""


def ask(
    path: Path, verb: str, args: dict[str, Any] | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> Any:
    """The result of one verb. ControlError if there is none within the time."""
    try:
        line = _exchange(path, encode_request(Request(verb, args or {})), time.monotonic() + timeout_seconds)
        response = decode_response(line)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ControlError(f"no podloom answers on {path}: start it with `podloom up`") from None
    except PermissionError:
        raise ControlError(f"{path} is root's: run this as root") from None
    except TimeoutError:
        raise ControlError(f"podloom did not answer on {path} within {timeout_seconds:g} s") from None
    except (OSError, MessageError) as error:
        raise ControlError(f"no usable answer on {path}: {error}") from None
    if response.error is not None:
        raise ControlError(response.error)
    return response.result


def _exchange(path: Path, line: bytes, deadline: float) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_left(deadline))
        connection.connect(str(path))
        with suppress(BrokenPipeError):  # Who is refused unheard can still read why.
            connection.sendall(line)
        received = bytearray()
        while not received.endswith(b"\n"):
            connection.settimeout(_left(deadline))
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionError("the daemon closed the connection")
            received += piece
            if len(received) > MAX_RESPONSE_BYTES:
                raise MessageError("the answer is too long")
        return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
