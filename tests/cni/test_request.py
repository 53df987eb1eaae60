"""request.parse: which calls are well formed, and with which code the others are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.request import STDIN_LIMIT, parse
from cni.result import VERSIONS, CniError, Ip

CONF: dict[str, Any] = {"cniVersion": "1.0.0", "name": "podnet", "type": "podloom-cni"}
PREVIOUS = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/32"}]}
ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
}


def stdin(**keys: Any) -> bytes:
    return json.dumps(CONF | keys).encode()


def refused(env: dict[str, str], text: bytes) -> CniError:
    with pytest.raises(CniError) as caught:
        parse(env, text)
    return caught.value


def test_a_whole_request() -> None:
    env = ENV | {"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web-0;", "CNI_NETNS_OVERRIDE": "true"}
    request = parse(env, stdin(unknown={"x": 1}, prevResult=PREVIOUS))
    assert (request.command, request.version, request.network) == ("ADD", "1.0.0", "podnet")
    assert (request.container, request.netns, request.ifname) == ("c1", "/run/netns/x", "eth0")
    assert request.args == {"IgnoreUnknown": "1", "K8S_POD_NAME": "web-0"}
    assert request.netns_override
    assert request.previous is not None
    assert request.previous.ips == (Ip("10.0.0.2/32"),)


REQUIRED = {
    "ADD": {"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"},
    "DEL": {"CNI_CONTAINERID", "CNI_IFNAME"},
    "CHECK": {"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"},
}


@pytest.mark.parametrize("command", REQUIRED)
@pytest.mark.parametrize("emptied", [True, False], ids=["empty", "absent"])
def test_each_missing_variable_is_named(command: str, emptied: bool) -> None:
    env = ENV | {"CNI_COMMAND": command}
    for missing in REQUIRED[command]:
        without = env | {missing: ""} if emptied else {k: v for k, v in env.items() if k != missing}
        error = refused(without, stdin())
        assert error.code == 4
        assert missing in error.msg
    bare = refused({"CNI_COMMAND": command}, stdin())
    assert all(name in bare.msg for name in REQUIRED[command])
    for optional in ENV.keys() - REQUIRED[command] - {"CNI_COMMAND"}:
        parse({k: v for k, v in env.items() if k != optional}, stdin())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_COMMAND", ""),
        ("CNI_COMMAND", "add"),
        ("CNI_COMMAND", "DESTROY"),
        ("CNI_CONTAINERID", "-c"),
        ("CNI_CONTAINERID", "../c"),
        ("CNI_CONTAINERID", "c/d"),
        ("CNI_CONTAINERID", "c\n"),
        ("CNI_CONTAINERID", "c\u0663"),
        ("CNI_IFNAME", "."),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", "a\tb"),
        ("CNI_IFNAME", "a\x00b"),
        ("CNI_IFNAME", "\udcff"),
        ("CNI_IFNAME", "a" * 16),
        ("CNI_IFNAME", "\u00e9" * 8),
        ("CNI_ARGS", "K8S_POD_NAME"),
        ("CNI_ARGS", "=x"),
        ("CNI_ARGS", "a=1;b"),
    ],
)
def test_a_malformed_variable_is_named(variable: str, value: str) -> None:
    error = refused(ENV | {variable: value}, stdin())
    assert error.code == 4
    assert variable in error.msg


@pytest.mark.parametrize("ifname", ["a" * 15, "eth0.100", "...", "\u00e9" * 7])
def test_interface_names_the_kernel_takes(ifname: str) -> None:
    assert parse(ENV | {"CNI_IFNAME": ifname}, stdin()).ifname == ifname


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"name": "\xe9"}',
        b"[" * 100_000,
        b" " * STDIN_LIMIT + b"{}",
        '{"name": "x"}'.encode("utf-16"),
    ],
    ids=range(11),
)
def test_what_is_no_json_object(text: bytes) -> None:
    assert refused(ENV, text).code == 6


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../etc"}, "'../etc'"),
        ({"name": "a b"}, "'a b'"),
        ({"name": "x\n"}, "name"),
        ({"name": 5}, "name"),
        ({"name": ["x"]}, "name"),
        ({"dns": []}, "dns"),
        ({"stateDir": 1}, "stateDir"),
        ({"prevResult": "x"}, "prevResult"),
        ({"prevResult": {"ips": 5}}, "ips"),
        ({"prevResult": {"ips": ["10.0.0.1"]}}, "10.0.0.1"),
        ({"prevResult": {"interfaces": [{"name": 5}]}}, "name"),
        ({"prevResult": {"ips": [{"address": "10.0.0.1/8", "interface": "0"}]}}, "interface"),
        ({"prevResult": {"routes": [{"dst": "10.0.0.0/8", "mtu": True}]}}, "mtu"),
    ],
)
def test_a_bad_configuration_names_the_key(keys: dict[str, Any], named: str) -> None:
    error = refused(ENV, stdin(**keys))
    assert error.code == 7
    assert named in error.msg
    assert len(error.msg) < 300


@pytest.mark.parametrize(
    "version", [None, "", "0.1.0", "0.2.0", "0.5.0", "1.1", "1.2.0", "9.0.0", "x" * 9999]
)
def test_versions_we_do_not_speak(version: str | None) -> None:
    error = refused(ENV, stdin(cniVersion=version))
    assert (error.code, error.version) == (1, None)
    assert all(known in error.msg for known in VERSIONS)
    assert len(error.msg) < 300


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("command", "since"), [("ADD", "0.3.0"), ("DEL", "0.3.0"), ("CHECK", "0.4.0")])
def test_which_version_has_which_verb(command: str, since: str, version: str) -> None:
    env = ENV | {"CNI_COMMAND": command}
    if version >= since:
        assert parse(env, stdin(cniVersion=version)).version == version
    else:
        error = refused(env, stdin(cniVersion=version))
        assert (error.code, error.version) == (1, version)
        assert command in error.msg


def test_errors_carry_the_callers_version_once_it_is_known() -> None:
    assert refused(ENV, stdin(cniVersion="0.4.0", name="")).version == "0.4.0"
    assert refused(ENV | {"CNI_IFNAME": "a/b"}, stdin(cniVersion="0.4.0")).version == "0.4.0"


@pytest.mark.parametrize("text", [b"", b"\n", b"{}", b'{"cniVersion": "0.1.0"}'])
def test_version_needs_no_configuration(text: bytes) -> None:
    assert parse({"CNI_COMMAND": "VERSION"}, text).command == "VERSION"


def test_version_with_broken_json_is_refused() -> None:
    assert refused({"CNI_COMMAND": "VERSION"}, b"{").code == 6


TEXT = st.text("aZ0./-:= \x00\u00e9\u0663\ud800")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children) | st.dictionaries(TEXT, children),
)
VARIABLES = st.sampled_from([*ENV, "CNI_ARGS", "CNI_PATH"])
KEYS = st.sampled_from(["cniVersion", "name", "prevResult", "dns", "ipam", "controlSocket", "stateDir"])


@given(
    env=st.dictionaries(VARIABLES, TEXT).map(lambda strange: ENV | strange),
    conf=st.binary() | st.dictionaries(KEYS, JSON).map(lambda strange: stdin(**strange)),
)
@settings(deadline=None)
def test_whatever_comes_in_is_a_request_or_a_cni_error(env: dict[str, str], conf: bytes) -> None:
    try:
        request = parse(env, conf)
    except CniError as error:
        outcome = error.code in (1, 4, 6, 7) and bool(error.msg)
    else:
        outcome = "/" not in request.network + request.container + request.ifname
    assert outcome
