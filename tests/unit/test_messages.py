from __future__ import annotations

import subprocess
import sys

import pytest

from forwarder.control.messages import (
    MAX_LINE_BYTES,
    MAX_RESPONSE_BYTES,
    MessageError,
    Request,
    Response,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)


@pytest.mark.parametrize(
    "request_",
    [Request("status", {}), Request("cni", {"env": {"CNI_COMMAND": "ADD"}, "stdin": "{}\n\u2028é"})],
)
def test_a_request_survives_the_wire_as_one_line(request_: Request) -> None:
    line = encode_request(request_)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_request(line) == request_


@pytest.mark.parametrize(
    "response", [Response(result={"a": [1, None]}), Response(result=None), Response(error="no")]
)
def test_a_response_survives_the_wire_as_one_line(response: Response) -> None:
    line = encode_response(response)
    assert line.count(b"\n") == 1
    assert decode_response(line) == response


def test_args_may_be_left_out() -> None:
    assert decode_request(b'{"verb": "status"}') == Request("status", {})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "not JSON"),
        (b"status\n", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "verb = None: must be a string"),
        (b'{"verb": 1}', "verb = 1: must be a string"),
        (b'{"verb": "x", "args": []}', "args: must be an object"),
        (b'{"verb": "x", "arg": {}}', "unknown key 'arg'; allowed: verb, args"),
        (b'"' + b"x" * MAX_LINE_BYTES, f"allowed: at most {MAX_LINE_BYTES}"),
    ],
)
def test_what_is_no_request_is_refused(line: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        decode_request(line)


@pytest.mark.parametrize(
    "line", [b"{}", b'{"error": 1}', b'{"result": 1, "error": "x"}', b'{"result": 1, "more": 2}', b"x"]
)
def test_what_is_no_response_is_refused(line: bytes) -> None:
    with pytest.raises(MessageError):
        decode_response(line)


def test_too_long_a_message_is_not_sent() -> None:
    with pytest.raises(MessageError, match="allowed: at most"):
        encode_request(Request("cni", {"stdin": "x" * MAX_LINE_BYTES}))
    with pytest.raises(MessageError, match="allowed: at most"):
        encode_response(Response(result="x" * MAX_RESPONSE_BYTES))


def test_importing_the_module_stays_cheap() -> None:
    """The CNI plugin imports it at every start."""
    program = (
        "import sys, json, typing; before = set(sys.modules); import forwarder.control.messages; "
        "print(*sorted(set(sys.modules) - before - {'__future__'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["forwarder", "forwarder.control", "forwarder.control.messages"]
