"""ADD, DEL, CHECK and VERSION in every spec version, on real namespaces."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cni.result import VERSIONS
from cni.store import FILE_NAME
from tests.cni.conftest import MTU, NETWORK, Answer, Namespaces, Node, environment, links_of, sh

pytestmark = pytest.mark.root


def assert_error(answer: Answer, code: int, *words: str) -> None:
    assert answer.exit != 0
    assert answer.body["code"] == code, answer
    assert answer.body["cniVersion"] in VERSIONS
    for word in words:
        assert word in answer.body["msg"]


def addresses_of(pod: str, ifname: str = "eth0") -> set[str]:
    """Global addresses of the pod's interface, in CIDR form."""
    link = json.loads(sh("ip", "-n", pod, "-j", "addr", "show", "dev", ifname))[0]
    return {f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"}


def with_previous(node: Node, added: Answer, version: str = "1.0.0") -> dict[str, Any]:
    return node.conf(version, prevResult=added.body)


# --- ADD


def test_add_result_in_every_version(node: Node, namespaces: Namespaces, version: str) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod, node.conf(version))
    assert added.exit == 0, added
    (host_name,) = (name for name in node.links() if name.startswith("pl"))
    host, eth0 = node.links()[host_name], links_of(pod)["eth0"]
    mtu = {"mtu": MTU} if version == "1.1.0" else {}
    four, six = ({"version": "4"}, {"version": "6"}) if version < "1.0.0" else ({}, {})
    assert added.body == {
        "cniVersion": version,
        "interfaces": [
            {"name": host_name, "mac": host["address"], "sandbox": "", **mtu},
            {"name": "eth0", "mac": eth0["address"], "sandbox": f"/run/netns/{pod}", **mtu},
        ],
        "ips": [
            {**four, "address": "10.71.0.2/32", "gateway": "10.71.0.1", "interface": 1},
            {**six, "address": "fd71::2/128", "gateway": "fd71::1", "interface": 1},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.71.0.1"}, {"dst": "::/0", "gw": "fd71::1"}],
    }


def test_add_wires_the_pod(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    host = node.links()[added.body["interfaces"][0]["name"]]
    eth0 = links_of(pod)["eth0"]
    assert addresses_of(pod) == {"10.71.0.2/32", "fd71::2/128"}
    assert (eth0["mtu"], eth0["gso_max_segs"], eth0["operstate"]) == (MTU, 44, "UP")
    # What comes to the pod may be merged from more segments than one send takes: it is not cut again.
    assert (host["mtu"], host["gso_max_segs"], host["master"]) == (MTU, 65535, "loom0")
    assert host["ifalias"] == f"podloom podnet/{pod}/eth0"
    assert "tentative" not in sh("ip", "-n", pod, "addr"), "a pod that starts waits for no DAD"
    port = host["linkinfo"]["info_slave_data"]
    assert (port["isolated"], port["hairpin"]) == (True, False)
    for family, gateway in (("-4", "10.71.0.1"), ("-6", "fd71::1")):
        routes = json.loads(sh("ip", "-n", pod, "-j", family, "route"))
        assert {"default", gateway} <= {route["dst"] for route in routes}
    for key, value in {
        f"{pod} net.ipv6.conf.eth0.accept_ra": "0",
        f"{pod} net.ipv6.conf.eth0.accept_redirects": "0",
        f"{pod} net.ipv4.conf.eth0.accept_redirects": "0",
        f"{node.name} net.ipv6.conf.{host['ifname']}.disable_ipv6": "1",
    }.items():
        namespace, name = key.split()
        assert sh("ip", "netns", "exec", namespace, "sysctl", "-n", name).strip() == value, key


def test_pod_and_host_reach_each_other_at_once(node: Node, namespaces: Namespaces) -> None:
    """No duplicate address detection to wait for, and the gateway answers ARP and ND."""
    pod = namespaces.new()
    node.call("ADD", pod)
    for gateway, own in (("10.71.0.1", "10.71.0.2"), ("fd71::1", "fd71::2")):
        script = (
            "import socket,sys; f=socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET;"
            "s=socket.socket(f); s.settimeout(5)\n"
            "try: s.connect((sys.argv[1], 9))\n"
            "except ConnectionRefusedError: sys.exit(0)\n"
            "sys.exit(1)"
        )
        sh("ip", "netns", "exec", pod, "python3", "-c", script, gateway)
        sh("ip", "netns", "exec", node.name, "python3", "-c", script, own)


def test_add_hands_on_what_the_chain_made_before(node: Node, namespaces: Namespaces, version: str) -> None:
    pod = namespaces.new()
    earlier: dict[str, Any] = {
        "cniVersion": version,
        "interfaces": [{"name": "dummy0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}],
        "ips": [{"version": "4", "address": "192.0.2.1/24", "interface": 0}],
        "routes": [{"dst": "198.51.100.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    if version >= "1.0.0":
        del earlier["ips"][0]["version"]
    body = node.call("ADD", pod, node.conf(version, prevResult=earlier)).body
    assert body["interfaces"][0] == earlier["interfaces"][0]
    assert body["ips"][0] == earlier["ips"][0]
    assert body["routes"][0] == earlier["routes"][0]
    assert body["dns"] == earlier["dns"]
    assert body["interfaces"][body["ips"][1]["interface"]]["name"] == "eth0"


def test_dns_of_the_configuration_is_in_the_result(node: Node, namespaces: Namespaces) -> None:
    dns = {"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]}
    assert node.call("ADD", namespaces.new(), node.conf(dns=dns)).body["dns"] == dns


def test_second_add_is_an_error_and_changes_nothing(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    before = node.traces(pod)
    assert_error(node.call("ADD", pod), 101, "attached already")
    assert node.traces(pod) == before
    assert node.call("CHECK", pod, with_previous(node, added)).exit == 0


def test_add_refuses_an_interface_name_in_use(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    node.call("DEL", pod)  # makes the store
    sh("ip", "-n", pod, "link", "add", "eth0", "type", "bridge")
    before = node.traces(pod)
    assert_error(node.call("ADD", pod), 4, "CNI_IFNAME", "eth0", "exists")
    assert node.traces(pod) == before


def test_add_refuses_a_foreign_link_with_the_host_ends_name(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    name = node.call("ADD", pod).body["interfaces"][0]["name"]
    node.call("DEL", pod)
    sh("ip", "-n", node.name, "link", "add", name, "type", "bridge")
    before = node.traces(pod)
    assert_error(node.call("ADD", pod), 100, name)
    assert node.call("DEL", pod).exit == 0
    assert node.traces(pod) == before


def test_two_interfaces_of_one_pod(node: Node, namespaces: Namespaces) -> None:
    """The first interface keeps the default route; each DEL takes its own."""
    pod = namespaces.new()
    first, second = node.call("ADD", pod), node.call("ADD", pod, CNI_IFNAME="net1")
    assert second.exit == 0, second
    assert first.body["ips"][0]["address"] != second.body["ips"][0]["address"]
    for added, ifname in ((first, "eth0"), (second, "net1")):
        assert node.call("CHECK", pod, with_previous(node, added), CNI_IFNAME=ifname).exit == 0
    for family in ("-4", "-6"):
        routes = json.loads(sh("ip", "-n", pod, "-j", family, "route", "show", "default"))
        assert min(routes, key=lambda route: route.get("metric", 0))["dev"] == "eth0"
    assert node.call("DEL", pod, CNI_IFNAME="net1").exit == 0
    assert node.call("CHECK", pod, with_previous(node, first)).exit == 0
    assert sorted(links_of(pod)) == ["eth0", "lo"]


@pytest.mark.parametrize(
    ("netns", "code"),
    [("/run/netns/none-such", 4), ("/dev/null", 4), ("/run/netns", 4), ("/run/netns/\x00", 4), ("{node}", 8)],
)
def test_add_refuses_what_is_no_pods_namespace(
    node: Node, namespaces: Namespaces, netns: str, code: int
) -> None:
    pod = namespaces.new()
    node.call("DEL", pod)
    before = node.traces(pod)
    path = netns.replace("{node}", f"/run/netns/{node.name}")
    assert_error(node.call("ADD", pod, CNI_NETNS=path), code, "CNI_NETNS")
    assert node.traces(pod) == before


def test_add_without_the_bridge_says_what_to_start(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    sh("ip", "-n", node.name, "link", "del", "loom0")
    assert_error(node.call("ADD", pod), 11, "loom0", "podloom up")
    assert node.traces(pod)["held"] == []


def test_add_when_the_pool_is_used_up(node: Node, namespaces: Namespaces) -> None:
    """A clear error, and service again as soon as one address is back."""
    from dataclasses import replace
    from ipaddress import ip_address, ip_network

    node.service.network = replace(
        NETWORK, prefixes=(ip_network("10.71.0.0/30"),), gateways=(ip_address("10.71.0.1"),)
    )
    pods = [namespaces.new(), namespaces.new()]
    assert node.call("ADD", pods[0]).exit == 0
    before = node.traces(*pods)
    assert_error(node.call("ADD", pods[1]), 11, "10.71.0.1 to 10.71.0.2")
    assert node.traces(*pods) == before
    node.call("DEL", pods[0])
    assert node.call("ADD", pods[1]).body["ips"][0]["address"] == "10.71.0.2/32"


def test_an_ipv4_node_serves_where_ipv6_is_absent(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cni.netlink.ipv6_present", lambda: False)
    pod = namespaces.new()
    added = node.call("ADD", pod)
    assert [ip["address"] for ip in added.body["ips"]] == ["10.71.0.2/32"]
    assert node.call("CHECK", pod, with_previous(node, added)).exit == 0
    assert node.call("DEL", pod).exit == 0


def test_ipv6_switched_off_in_the_pod_is_switched_on_for_our_link(node: Node, namespaces: Namespaces) -> None:
    """Container runtimes start pods with IPv6 disabled."""
    pod = namespaces.new()
    for scope in ("all", "default"):
        sh("ip", "netns", "exec", pod, "sysctl", "-qw", f"net.ipv6.conf.{scope}.disable_ipv6=1")
    assert node.call("ADD", pod).exit == 0
    assert addresses_of(pod) == {"10.71.0.2/32", "fd71::2/128"}


def test_parallel_adds_get_addresses_of_their_own(node: Node, namespaces: Namespaces) -> None:
    pods = [namespaces.new() for _ in range(24)]
    before = node.links()
    with ThreadPoolExecutor(8) as threads:
        added = list(threads.map(lambda pod: node.call("ADD", pod), pods))
        given = [ip["address"] for answer in added for ip in answer.body["ips"]]
        assert len(set(given)) == 2 * len(pods)
        assert {addr for pod in pods for addr in addresses_of(pod)} == set(given)
        assert all(answer.exit == 0 for answer in threads.map(lambda pod: node.call("DEL", pod), pods))
    assert (node.held(), node.records()) == ([], [])
    assert node.links().keys() == before.keys()


def test_parallel_adds_of_one_attachment_give_one(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: node.call("ADD", pod), range(4)))
    assert sorted(answer.exit for answer in answers) == [0, 1, 1, 1]
    assert len(node.held()) == 2


# --- a failure at any step


def steps_of_an_add(
    node: Node, pod: str, monkeypatch: pytest.MonkeyPatch, fail_at: int, *, done: bool
) -> tuple[Answer, list[str]]:
    """One ADD whose step number `fail_at` fails, after it was `done` or before; and the steps it took.

    A step is a call that asks something of the kernel or of the store.
    """
    from cni import netlink
    from cni.netlink import Netlink
    from cni.store import Store

    steps: list[str] = []

    def stepped(name: str, function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            failing = len(steps) == fail_at + 1
            if failing and not done:
                raise OSError(28, f"injected before {name}")
            value = function(*args, **kwargs)
            if failing:
                if isinstance(value, Netlink):
                    value.close()
                raise OSError(28, f"injected after {name}")
            return value

        return step

    with monkeypatch.context() as patch:
        for owner in (Netlink, Store):
            for name, function in vars(owner).items():
                if not name.startswith("_") and name != "close":
                    patch.setattr(owner, name, stepped(f"{owner.__name__}.{name}", function))
        patch.setattr(netlink, "set_link_sysctls", stepped("set_link_sysctls", netlink.set_link_sysctls))
        answer = node.call("ADD", pod)
    return answer, steps


@pytest.mark.parametrize("done", [True, False], ids=["after", "before"])
def test_a_failure_at_any_step_of_add_leaves_no_trace(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    pod, other = namespaces.new(), namespaces.new()
    node.call("ADD", other)
    answer, steps = steps_of_an_add(node, pod, monkeypatch, fail_at=-2, done=done)
    assert answer.exit == 0
    assert len(steps) > 12
    node.call("DEL", pod)
    before = node.traces(pod, other)
    for fail_at in range(len(steps)):
        answer, taken = steps_of_an_add(node, pod, monkeypatch, fail_at, done=done)
        assert_error(answer, 5, "injected", steps[fail_at])
        assert taken[: fail_at + 1] == steps[: fail_at + 1]
        # The failure closed the store and the socket it happened on; the next call opens them again.
        assert node.call("DEL", "nobody").exit == 0
        assert node.traces(pod, other) == before, steps[fail_at]
    assert node.call("ADD", pod).exit == 0


# --- DEL


def test_del_in_every_version_leaves_nothing(node: Node, namespaces: Namespaces, version: str) -> None:
    pod = namespaces.new()
    node.call("DEL", pod)
    before = node.traces(pod)
    added = node.call("ADD", pod, node.conf(version))
    deleted = node.call("DEL", pod, with_previous(node, added, version))
    assert deleted == Answer(0, None)
    assert node.traces(pod) == before


@pytest.mark.parametrize(
    "how",
    [
        "twice",
        "never added",
        "netns gone",
        "netns empty",
        "netns nonsense",
        "link gone",
        "store gone",
        "no prevResult",
    ],
)
def test_del_succeeds_whatever_is_gone(node: Node, namespaces: Namespaces, how: str) -> None:
    pod = namespaces.new()
    conf, netns_path = node.conf(), f"/run/netns/{pod}"
    if how != "never added":
        added = node.call("ADD", pod)
        conf = node.conf() if how == "no prevResult" else with_previous(node, added)
    match how:
        case "twice":
            assert node.call("DEL", pod, conf).exit == 0
        case "netns gone":
            sh("ip", "netns", "del", pod)
        case "netns empty":
            netns_path = ""
        case "netns nonsense":
            netns_path = "/proc/0/ns/net"
        case "link gone":
            sh("ip", "-n", pod, "link", "del", "eth0")
        case "store gone":
            node.service.close()
            shutil.rmtree(node.state_dir)
    assert node.call("DEL", pod, conf, CNI_NETNS=netns_path) == Answer(0, None)
    assert (node.held(), node.records()) == ([], [])
    assert not [name for name in node.links() if name.startswith("pl")]


def test_del_takes_only_its_own(node: Node, namespaces: Namespaces) -> None:
    """State is keyed by network, container and interface."""
    pod, other = namespaces.new(), namespaces.new()
    kept = node.call("ADD", other)
    node.call("ADD", pod)
    assert node.call("DEL", pod, node.conf(name="othernet")).exit == 0
    assert node.call("DEL", pod, CNI_IFNAME="net1").exit == 0
    assert len(node.held()) == 4
    assert node.call("DEL", pod).exit == 0
    assert node.call("CHECK", other, with_previous(node, kept)).exit == 0


def test_del_that_fails_can_be_repeated(
    node: Node, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cni.netlink import Netlink, NetlinkError

    pod = namespaces.new()
    node.call("ADD", pod)

    def refuse(self: Netlink, name: str) -> None:
        raise NetlinkError(1, f"delete {name}: Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Netlink, "delete_link", refuse)
        assert_error(node.call("DEL", pod), 100, "Operation not permitted")
    assert len(node.held()) == 2
    assert node.call("DEL", pod).exit == 0
    assert node.held() == []


def test_a_killed_add_is_taken_up_by_the_next(node: Node, namespaces: Namespaces) -> None:
    """What the first left (record, link, address in the pod) is cleared, and its address not lost."""
    pod = namespaces.new()
    node.call("ADD", pod)
    database = sqlite3.connect(node.state_dir / FILE_NAME)
    with database:
        database.execute("UPDATE attachments SET attached_at = NULL")
    database.close()
    added = node.call("ADD", pod)
    assert added.exit == 0
    assert len(node.held()) == 2
    assert node.call("CHECK", pod, with_previous(node, added)).exit == 0


# --- CHECK


@pytest.mark.parametrize("checked", ["0.4.0", "1.0.0", "1.1.0"])
def test_check_passes_right_after_add(node: Node, namespaces: Namespaces, checked: str) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod, node.conf(checked))
    assert node.call("CHECK", pod, with_previous(node, added, checked)) == Answer(0, None)


@pytest.mark.parametrize("unchecked", ["0.3.0", "0.3.1"])
def test_check_is_not_in_old_versions(node: Node, namespaces: Namespaces, unchecked: str) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod, node.conf(unchecked))
    assert_error(node.call("CHECK", pod, with_previous(node, added, unchecked)), 1, "CHECK", "0.4.0")


DAMAGES = {
    "address 4": ["ip -n {pod} addr del 10.71.0.2/32 dev eth0"],
    "address 6": ["ip -n {pod} addr del fd71::2/128 dev eth0"],
    "default route 4": ["ip -n {pod} -4 route del default"],
    "default route 6": ["ip -n {pod} -6 route del default"],
    "default route elsewhere": [
        "ip -n {pod} -4 route del default",
        "ip -n {pod} link add d0 type bridge",
        "ip -n {pod} link set d0 up",
        "ip -n {pod} -4 route add default dev d0",
    ],
    "gateway route": ["ip -n {pod} -6 route del fd71::1/128"],
    "link down in the pod": ["ip -n {pod} link set eth0 down"],
    "link gone": ["ip -n {pod} link del eth0"],
    "another link instead": ["ip -n {pod} link del eth0", "ip -n {pod} link add eth0 type bridge"],
    "port down": ["ip -n {node} link set {port} down"],
    "port off the bridge": ["ip -n {node} link set {port} nomaster"],
    "port not isolated": ["ip -n {node} link set {port} type bridge_slave isolated off"],
    "bridge gone": ["ip -n {node} link del loom0"],
    "bridge down": ["ip -n {node} link set loom0 down"],
    "another link in the host end's place": [
        "ip -n {node} link del {port}",
        "ip -n {node} link add {port} master loom0 up type veth",
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_finds_damage(node: Node, namespaces: Namespaces, damage: str) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    for command in DAMAGES[damage]:
        sh(*command.format(pod=pod, node=node.name, port=added.body["interfaces"][0]["name"]).split())
    assert_error(node.call("CHECK", pod, with_previous(node, added)), 102)


def test_check_finds_a_lost_reservation(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    node.service.close()
    shutil.rmtree(node.state_dir)
    assert_error(node.call("CHECK", pod, with_previous(node, added)), 102, "no address is held")


def test_check_finds_an_address_that_was_not_promised(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    del added.body["ips"][0]
    assert_error(node.call("CHECK", pod, with_previous(node, added)), 102, "10.71.0.2")


def test_check_allows_what_later_plugins_do(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    added = node.call("ADD", pod)
    for command in (
        "ip -n {} route add 192.0.2.0/24 via 10.71.0.1",
        "ip -n {} link set eth0 address 02:00:00:00:00:99",
        "ip -n {} addr add 192.0.2.9/32 dev eth0",
        "ip -n {} link set eth0 mtu 1400",
    ):
        sh(*command.format(pod).split())
    added.body["ips"].append({"address": "192.0.2.9/32"})
    assert node.call("CHECK", pod, with_previous(node, added)).exit == 0


def test_check_needs_the_previous_result(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    node.call("ADD", pod)
    assert_error(node.call("CHECK", pod), 7, "prevResult")


# --- the store


def test_another_boots_attachments_are_released(node: Node, namespaces: Namespaces) -> None:
    """After a reboot no DEL comes for the pods that were."""
    pod = namespaces.new()
    node.call("ADD", pod)
    node.service.close()
    database = sqlite3.connect(node.state_dir / FILE_NAME)
    with database:
        database.execute("UPDATE attachments SET boot_id = 'another'")
        database.execute("UPDATE boot SET boot_id = 'another'")
    database.close()
    assert node.call("DEL", namespaces.new()).exit == 0
    assert (node.held(), node.records()) == ([], [])


@pytest.mark.parametrize("harm", ["corrupt", "future", "a directory"])
def test_an_unusable_store_is_a_clear_error(node: Node, namespaces: Namespaces, harm: str) -> None:
    pod, other = namespaces.new(), namespaces.new()
    added = node.call("ADD", pod)
    node.service.close()
    path = node.state_dir / FILE_NAME
    match harm:
        case "corrupt":
            path.write_bytes(os.urandom(8192))
        case "future":
            database = sqlite3.connect(path)
            database.execute("PRAGMA user_version = 99")
            database.close()
        case _:
            path.unlink()
            path.mkdir()
    links = sorted(node.links()), sorted(links_of(pod))
    for command, conf in (("ADD", node.conf()), ("DEL", node.conf()), ("CHECK", with_previous(node, added))):
        assert_error(node.call(command, other, conf), 5, str(path))
    assert (sorted(node.links()), sorted(links_of(pod))) == links


def test_state_is_for_root_only(node: Node, namespaces: Namespaces) -> None:
    node.call("ADD", namespaces.new())
    assert node.state_dir.stat().st_mode & 0o777 == 0o700
    assert (node.state_dir / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_version_needs_nothing(node: Node) -> None:
    for stdin in ("", '{"cniVersion": "0.4.0"}'):
        answer = Answer.of(*node.handle({"CNI_COMMAND": "VERSION"}, stdin))
        assert answer.body["supportedVersions"] == list(VERSIONS)
    assert answer.body["cniVersion"] == "0.4.0"
    assert not node.state_dir.exists()


def test_environment_reaches_the_record(node: Node, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    node.handle(environment("ADD", pod), json.dumps(node.conf()))
    database = sqlite3.connect(node.state_dir / FILE_NAME)
    row = database.execute("SELECT pod_namespace, pod_name FROM attachments").fetchone()
    database.close()
    assert row == ("default", "web-0")
