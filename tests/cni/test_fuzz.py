"""Whatever comes in on stdin and in the environment: one CNI error object, an exit status, no change."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni import plugin
from cni.netconf import QUARANTINE_S
from cni.request import STDIN_LIMIT
from cni.result import VERSIONS
from cni.store import Holder, Store
from tests.cni.conftest import Answer, Node, environment

VERBS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
NOWHERE = {"controlSocket": "/nonexistent/podloom.sock", "stateDir": "/nonexistent/podloom"}

# Text as it comes from anywhere, and text that looks like what is expected.
TEXT = st.text(max_size=40) | st.sampled_from(
    ["", "..", "../../etc", "/", "eth0", "c1", "a" * 300, "\x00", "é"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "cniVersion",
    "name",
    "type",
    "ipam",
    "dns",
    "prevResult",
    "runtimeConfig",
    "args",
    "mtu",
    "spoofCheck",
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUES, max_size=5)
ENVIRONMENTS = st.fixed_dictionaries(
    {},
    optional={
        "CNI_COMMAND": st.sampled_from(VERBS) | TEXT,
        "CNI_CONTAINERID": TEXT,
        "CNI_NETNS": TEXT.map(lambda text: f"/nonexistent/{text}"),
        "CNI_IFNAME": TEXT,
        "CNI_ARGS": TEXT,
        "CNI_PATH": TEXT,
    },
)


def assert_an_error(exit_code: int, stdout: str) -> None:
    assert exit_code != 0
    body = json.loads(stdout)
    assert set(body) - {"details"} == {"cniVersion", "code", "msg"}
    assert body["cniVersion"] in VERSIONS
    assert isinstance(body["code"], int)
    assert 0 < body["code"] != 999, body
    assert body["msg"]
    assert stdout.count("\n") == 1


@settings(max_examples=400, deadline=None)
@given(ENVIRONMENTS, st.binary(max_size=200) | CONFIGS.map(lambda conf: json.dumps(conf | NOWHERE).encode()))
def test_the_plugin_answers_anything(env: dict[str, str], stdin: bytes) -> None:
    """With no daemon and no state directory, only VERSION and calls about nothing can succeed."""
    exit_code, stdout, stderr = plugin.run(env, io.BytesIO(stdin))
    if exit_code == 0:
        assert not env or env["CNI_COMMAND"] in ("VERSION", "DEL")
        return
    assert stderr == ""
    assert_an_error(exit_code, stdout)


@pytest.mark.root
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    verb=st.sampled_from(("ADD", "CHECK", "STATUS", "GC")),
    config=CONFIGS,
    runtime=st.dictionaries(
        st.sampled_from(("ips", "mac", "dns", "ipRanges", "portMappings", "bandwidth", "cgroupPath")), VALUES
    ),
)
def test_the_service_answers_any_configuration(
    node: Node, verb: str, config: dict[str, Any], runtime: dict[str, Any]
) -> None:
    conf = node.conf("1.1.0", runtimeConfig=runtime) | config | {"cniVersion": "1.1.0", "name": "podnet"}
    env = environment(verb, "c1", CNI_NETNS="/nonexistent")
    answer = Answer.of(*node.handle(env, json.dumps(conf)))
    if answer.exit != 0:
        assert_an_error(answer.exit, json.dumps(answer.body) + "\n")
    else:
        assert verb == "STATUS"
    if (node.state_dir / "cni.sqlite3").exists():
        assert (node.held(), node.records()) == ([], [])


CASES: dict[str, bytes] = {
    "10 MB": b'{"cniVersion": "1.1.0", "name": "' + b"x" * 10_000_000 + b'"}',
    "just too long": b'{"name": "' + b"x" * STDIN_LIMIT + b'"}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no UTF-8": b'{"name": "\xff"}',
    "lone surrogate": b'{"cniVersion": "1.0.0", "name": "\\ud800"}',
    "unicode name": '{"cniVersion": "1.0.0", "name": "pödnet"}'.encode(),
    "path as name": b'{"cniVersion": "1.0.0", "name": "../../etc"}',
    "NaN": b'{"cniVersion": NaN, "name": "x"}',
    "twice": b'{"cniVersion": "1.0.0", "name": "x"} {}',
    "array": b"[]",
    **{f"version {n}": b'{"cniVersion": "%d.1.0", "name": "x"}' % n for n in (2, 3, 9)},
    "version 0.1": b'{"cniVersion": "0.1", "name": "x"}',
    "version a number": b'{"cniVersion": 1, "name": "x"}',
}


@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
@pytest.mark.parametrize("case", CASES)
def test_known_bad_input(verb: str, case: str) -> None:
    exit_code, stdout, _ = plugin.run(environment(verb, "c1"), io.BytesIO(CASES[case]))
    assert_an_error(exit_code, stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_lives_of_the_store(tmp_path: Any, record_property: Any) -> None:
    """Attach and detach over and over: nothing is left, and no address comes back before its rest is over."""
    from ipaddress import ip_address, ip_network

    from cni.ipam import Pool
    from cni.request import Attachment

    cycles, living, step = 100_000, 50, 0.3  # seconds between two ADDs: the pool is just large enough
    pool = Pool.of_prefix(ip_network("10.71.0.0/24"), ip_address("10.71.0.1"))
    store = Store(tmp_path, "boot", 0.0)
    store._run("PRAGMA synchronous = OFF")  # what is tested here is not the disk
    released: dict[object, float] = {}
    shortest = float("inf")
    for number in range(cycles + living):
        now = number * step
        if number >= living:
            gone = Attachment("podnet", f"c{number - living}", "eth0")
            record = store.find(gone)
            assert record is not None
            store.release(gone, now)
            released[record.leases[0].address] = now
        if number < cycles:
            new = Attachment("podnet", f"c{number}", "eth0")
            (lease,) = store.reserve(new, Holder("pl", "loom0"), [(pool,)], now)
            store.complete(new, now)
            store._run("PRAGMA synchronous = OFF")
            if lease.address in released:
                shortest = min(shortest, now - released[lease.address])
    assert store.records() == []
    assert store._one("SELECT count(*) FROM addresses WHERE rests_until IS NULL")[0] == 0
    assert shortest >= QUARANTINE_S
    store.close()
    record_property(
        "lives", f"{cycles}, nothing left; an address came back after {shortest:.0f} s at the soonest"
    )
