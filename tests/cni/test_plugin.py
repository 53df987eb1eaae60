"""The real `podloom-cni` process, with the daemon there, away, and answering nonsense."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cni import client, plugin
from cni.request import STDIN_LIMIT
from cni.result import VERSIONS
from forwarder.control.messages import (
    DEFAULT_RUN_DIR,
    MAX_LINE_BYTES,
    SOCKET_NAME,
    Request,
    encode_request,
)
from tests.cni.conftest import (
    REPOSITORY,
    ControlServer,
    Namespaces,
    Node,
    environment,
    links_of,
    run_plugin,
    sh,
)

root = pytest.mark.root


def answered(done: subprocess.CompletedProcess[bytes]) -> Any:
    """What was printed: exactly one JSON object, or None."""
    assert done.stderr == b""
    return json.loads(done.stdout) if done.stdout else None


def text(node: Node, **keys: Any) -> bytes:
    return json.dumps(node.conf(**keys)).encode()


@root
def test_a_pods_life_through_the_daemon(node: Node, namespaces: Namespaces, control_socket: Path) -> None:
    pod = namespaces.new()
    added = run_plugin(environment("ADD", pod), text(node))
    assert added.returncode == 0
    body = answered(added)
    assert body["ips"][0]["address"] == "10.71.0.2/32"
    assert "eth0" in links_of(pod)
    for command in ("CHECK", "DEL", "DEL"):
        done = run_plugin(environment(command, pod), text(node, prevResult=body))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), command
    assert node.held() == []
    failed = run_plugin(environment("CHECK", pod), text(node, prevResult=body))
    assert failed.returncode != 0
    assert answered(failed)["code"] == 102


@root
def test_the_daemon_away(node: Node, namespaces: Namespaces) -> None:
    """DEL, CHECK and GC do their work on the same store; CHECK also says that the pod is cut off, and ADD
    what to start."""
    pod = namespaces.new()
    added = node.call("ADD", pod)
    node.service.close()
    conf = text(node, prevResult=added.body)
    cut_off = answered(run_plugin(environment("CHECK", pod), conf, in_namespace=node.name))
    assert (cut_off["code"], "as it was made" in cut_off["msg"]) == (11, True)
    sh("ip", "-n", pod, "addr", "del", "10.71.0.2/32", "dev", "eth0")
    damaged = answered(run_plugin(environment("CHECK", pod), conf, in_namespace=node.name))
    assert (damaged["code"], "10.71.0.2" in damaged["msg"]) == (102, True)
    for _ in range(2):
        done = run_plugin(environment("DEL", pod), conf, in_namespace=node.name)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (node.held(), node.records()) == ([], [])
    assert not [name for name in node.links() if name.startswith("pl")]
    assert node.call("ADD", pod).exit == 0
    node.service.close()
    env = {"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}
    conf = json.dumps(node.conf("1.1.0") | {"cni.dev/valid-attachments": []}).encode()
    collected = run_plugin(env, conf, in_namespace=node.name)
    assert (collected.returncode, collected.stdout) == (0, b"")
    assert (node.held(), node.records(), sorted(links_of(pod))) == ([], [], ["lo"])
    refused = run_plugin(environment("ADD", pod), text(node), in_namespace=node.name)
    assert refused.returncode != 0
    error = answered(refused)
    assert (error["code"], error["cniVersion"]) == (11, "1.0.0")
    assert "podloom up" in error["msg"]
    assert str(node.control_socket) in error["details"]


BAD_ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "half a line": b'{"result": {"exit": 0',
    "no json": b"hello\n",
    "no result": b"{}\n",
    "an error": b'{"error": "unknown verb cni"}\n',
    "another result": b'{"result": {"peers": []}}\n',
    "no end": b"x" * (2 << 20),
}


@pytest.mark.parametrize("bad", BAD_ANSWERS)
def test_a_daemon_that_answers_nonsense_is_away(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "control.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            try:
                connection.sendall(BAD_ANSWERS[bad])
            except BrokenPipeError:
                return

    thread = threading.Thread(target=answer)
    thread.start()
    conf = {"cniVersion": "1.1.0", "name": "podnet", "type": "podloom-cni", "controlSocket": str(path)}
    done = run_plugin(environment("ADD", "c1"), json.dumps(conf).encode())
    thread.join()
    listener.close()
    assert done.returncode != 0
    assert answered(done)["code"] == 11


def test_a_silent_daemon_is_given_up_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        monkeypatch.setattr(client, "DEADLINE_S", 0.05)
        monkeypatch.setattr(client, "STATUS_DEADLINE_S", 0.05)
        conf = {"cniVersion": "1.1.0", "name": "podnet", "controlSocket": str(path)}
        for command, code in (("ADD", 11), ("STATUS", 51)):
            exit_code, stdout, _ = plugin.run(
                environment(command, "c1"), io.BytesIO(json.dumps(conf).encode())
            )
            assert (exit_code, json.loads(stdout)["code"]) == (1, code)
            assert "timed out" in json.loads(stdout)["details"]


MALFORMED: dict[str, tuple[dict[str, str], bytes, int]] = {
    "all variables missing": ({"CNI_COMMAND": "ADD"}, b"{}", 4),
    "command missing": ({"CNI_CONTAINERID": "x"}, b"{}", 4),
    "command unknown": ({"CNI_COMMAND": "FLY"}, b"{}", 4),
    "container id malformed": (environment("ADD", "../c1"), b'{"cniVersion": "1.0.0", "name": "x"}', 4),
    "stdin empty": (environment("ADD", "c1"), b"", 6),
    "stdin not text": (environment("ADD", "c1"), b"\xff", 6),
    "stdin not json": (environment("DEL", "c1"), b"{]", 6),
    "stdin 10 MB": (environment("ADD", "c1"), b'{"name": "' + b"x" * 10_000_000 + b'"}', 6),
    "version unknown": (environment("ADD", "c1"), b'{"cniVersion": "9.0.0", "name": "x"}', 1),
    "verb not in version": (environment("CHECK", "c1"), b'{"cniVersion": "0.3.1", "name": "x"}', 1),
    "name malformed": (environment("ADD", "c1"), b'{"cniVersion": "1.0.0", "name": "a/b"}', 7),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_calls_need_no_daemon(case: str) -> None:
    env, stdin, code = MALFORMED[case]
    nowhere = b'"controlSocket": "/nonexistent/control.sock", '
    done = run_plugin(env, stdin.replace(b'{"cni', b"{" + nowhere + b'"cni', 1))
    assert done.returncode != 0
    assert answered(done)["code"] == code


@pytest.mark.parametrize("stdin", [b"", b'{"cniVersion": "0.4.0"}'])
def test_version_needs_no_daemon(stdin: bytes) -> None:
    done = run_plugin({"CNI_COMMAND": "VERSION"}, stdin)
    assert done.returncode == 0
    assert answered(done)["supportedVersions"] == list(VERSIONS)


def test_a_person_is_told_what_it_is() -> None:
    done = run_plugin({}, b"")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"podloom-cni" in done.stderr
    assert all(version.encode() in done.stderr for version in VERSIONS)


def test_closed_stdin() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m cni <&-', sys.executable],
        capture_output=True,
        check=False,
        env={"PYTHONPATH": str(REPOSITORY), **environment("ADD", "c1")},
    )
    assert done.returncode != 0
    assert answered(done)["code"] == 6


def test_unreadable_stdin() -> None:
    class Broken(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    exit_code, stdout, _ = plugin.run(environment("ADD", "c1"), Broken())
    assert exit_code != 0
    assert json.loads(stdout)["code"] == 5


def test_the_way_to_the_daemon_imports_little(tmp_path: Path) -> None:
    """A runtime starts this process for every call: what costs much must not be on the way."""
    with ControlServer(tmp_path / "control.sock", lambda *_: (0, "{}")):
        conf = {"cniVersion": "1.1.0", "name": "x", "controlSocket": str(tmp_path / "control.sock")}
        script = "import sys, cni.__main__ as m; m.main(); print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-S", "-c", script],
            input=json.dumps(conf),
            env=environment("ADD", "c1") | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
    bare = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = {"cni", "cni.__main__", "cni.client", "cni.plugin", "_json", "_socket"}
    assert set(done.stdout.removeprefix("{}").split()) - set(bare.stdout.split()) == ours


def test_the_client_speaks_the_control_protocol() -> None:
    """It repeats what messages says, to be spared importing it."""
    env = {"CNI_COMMAND": "ADD", "CNI_ARGS": 'a="\\;\n\x00é\ud800'}
    text = '{"name": "pøds\U0001f9f6"}'
    args = {"env": env, "stdin": text, "began_at": 12345.678901234}
    assert client.encode_call(env, text, 12345.678901234) == encode_request(Request("cni", args))
    assert f"{DEFAULT_RUN_DIR}/{SOCKET_NAME}" == client.DEFAULT_SOCKET
    assert (client.REQUEST_BYTES_MAX, plugin.STDIN_LIMIT) == (MAX_LINE_BYTES, STDIN_LIMIT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[]",
        "1",
        "{",
        '{"a" 1}',
        '{"a": 1} x',
        '{"a": 1}',
        ' {"a": [null, 1.5, "\\u00e9"]}\n',
        "[" * 9999,
    ],
)
def test_the_client_reads_json_as_json_does(text: str) -> None:
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        expected = None
    assert client.parse_object(text) == (expected if isinstance(expected, dict) else None)
