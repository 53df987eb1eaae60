"""Results and errors in each version's own shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.result import (
    NEWEST,
    VERSIONS,
    CniError,
    Code,
    Interface,
    Ip,
    Result,
    Route,
    error_json,
    parse_result,
    result_json,
    version_json,
)

FULL = Result(
    interfaces=(
        Interface("pl0", "fe:00:00:00:00:01", "", 1450),
        Interface("eth0", "02:00:00:00:00:01", "/run/netns/x", 1450, "/run/s", "0000:00:1f.6"),
    ),
    ips=(Ip("10.0.0.2/32", "10.0.0.1", 1), Ip("fd00::2/128", "", None)),
    routes=(Route("0.0.0.0/0", "10.0.0.1", {"mtu": 1400, "scope": 0}), Route("10.1.0.0/16")),
    dns={"nameservers": ["10.96.0.10"]},
)
# Each change of the format, by the version that made it: "Delta" in the spec's own release notes.
NEWER_INTERFACE = {"mtu": 1450, "socketPath": "/run/s", "pciID": "0000:00:1f.6"}
NEWER_ROUTE = {"mtu": 1400, "scope": 0}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_its_own_shape(version: str) -> None:
    body = json.loads(result_json(FULL, version))
    four, six = ({"version": "4"}, {"version": "6"}) if version < "1.0.0" else ({}, {})
    newest = version == "1.1.0"
    assert body == {
        "cniVersion": version,
        "interfaces": [
            {"name": "pl0", "mac": "fe:00:00:00:00:01", "sandbox": "", **({"mtu": 1450} if newest else {})},
            {
                "name": "eth0",
                "mac": "02:00:00:00:00:01",
                "sandbox": "/run/netns/x",
                **(NEWER_INTERFACE if newest else {}),
            },
        ],
        "ips": [
            {**four, "address": "10.0.0.2/32", "gateway": "10.0.0.1", "interface": 1},
            {**six, "address": "fd00::2/128"},
        ],
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "10.0.0.1", **(NEWER_ROUTE if newest else {})},
            {"dst": "10.1.0.0/16"},
        ],
        "dns": {"nameservers": ["10.96.0.10"]},
    }


def test_the_newest_version_loses_nothing() -> None:
    assert parse_result(json.loads(result_json(FULL, NEWEST))) == FULL


def test_empty_parts_are_left_out() -> None:
    assert json.loads(result_json(Result(), "1.0.0")) == {"cniVersion": "1.0.0"}


@pytest.mark.parametrize("index", [{}, {"interface": -1}, {"interface": None}])
def test_an_address_without_an_interface(index: dict[str, Any]) -> None:
    raw = {"ips": [{"address": "10.0.0.2/24", **index}], "interfaces": None, "routes": None}
    assert parse_result(raw) == Result(ips=(Ip("10.0.0.2/24"),))


def test_following_results_keep_their_interface() -> None:
    joined = FULL.followed_by(Result((Interface("net1"),), (Ip("10.9.0.1/24", "", 0), Ip("10.9.0.2/24"))))
    assert [ip.interface for ip in joined.ips] == [1, None, 2, None]
    assert joined.interfaces[2].name == "net1"
    assert joined.dns == FULL.dns


def test_error_object() -> None:
    error = CniError(Code.TRY_AGAIN_LATER, "wait", "why", "0.4.0")
    assert json.loads(error_json(error)) == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "wait",
        "details": "why",
    }
    assert json.loads(error_json(CniError(Code.IO_FAILURE, "broken")))["cniVersion"] == NEWEST


def test_version_object() -> None:
    assert json.loads(version_json("0.2.0")) == {"cniVersion": "0.2.0", "supportedVersions": list(VERSIONS)}
    assert json.loads(version_json(""))["cniVersion"] == NEWEST


TEXT = st.text('a"\\\n\r\x00\x7f\u2028\u00e9\ud800\U0001f600')


@given(TEXT, TEXT)
def test_an_error_is_one_line_of_json_whatever_it_says(msg: str, details: str) -> None:
    line = error_json(CniError(Code.INTERNAL, msg, details))
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert line.isascii()
    assert json.loads(line)["msg"] == msg
