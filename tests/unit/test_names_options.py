from __future__ import annotations

import tomllib
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from forwarder import config
from forwarder.faults import Fault
from forwarder.names.options import NamesConfig, read_services
from forwarder.names.pods import pods_of
from forwarder.names.records import Endpoint, Pod, Port, Service
from tests.unit.test_config import MINIMAL, faults_of, text_of

SERVICES = """
[[service]]
name = "web"
namespace = "shop"
cluster_ips = ["10.43.0.10", "fd43::10"]
ports = [{ port = 80, name = "http" }, { port = 53, protocol = "udp" }]
[[service]]
name = "db"
endpoints = [{ addresses = ["10.42.1.5"], hostname = "db-0" }, { addresses = ["10.42.1.6"] }]
[[service]]
name = "mail"
external_name = "smtp.example.com"
"""


def test_services_of_a_file() -> None:
    assert config.parse(text_of(MINIMAL) + SERVICES).services == (
        Service(
            "web",
            "shop",
            (ip_address("10.43.0.10"), ip_address("fd43::10")),
            ports=(Port(80, "http"), Port(53, "", "udp")),
        ),
        Service(
            "db",
            endpoints=(Endpoint((ip_address("10.42.1.5"),), "db-0"), Endpoint((ip_address("10.42.1.6"),))),
        ),
        Service("mail", external_name="smtp.example.com"),
    )


def test_rendered_services_and_names_mean_the_same() -> None:
    names = '[names]\nenabled = true\nupstream = ["192.0.2.53", "[2001:db8::53]:5353"]\n'
    parsed = config.parse(text_of(MINIMAL) + "\n" + names + SERVICES)
    assert parsed.names == NamesConfig(True, upstream=("192.0.2.53", "[2001:db8::53]:5353"))
    assert config.parse(config.render(parsed)) == parsed


def test_the_example_shows_every_kind_of_service() -> None:
    lines = [
        line.removeprefix("#") if not line.startswith("# ") else "" for line in config.example().splitlines()
    ]
    parsed = config.parse("\n".join(lines))
    assert parsed.names == NamesConfig()
    assert [service.name for service in parsed.services] == ["web", "db", "mail"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("domain = 'a b'", 'names.domain = "a b": must be a DNS name'),
        ("domain = ''", "names.domain"),
        ("upstream = '192.0.2.1'", 'names.upstream = "192.0.2.1": must be a list of servers'),
        ("upstream = ['192.0.2.1', 'x']", 'names.upstream[1] = "x": must be a server such as'),
        ("queries_per_second = 0", "names.queries_per_second = 0: must be an integer from 1"),
        ("cache_bytes = 1", "names.cache_bytes = 1: must be an integer from 65536"),
        ("enabled = 1", "names.enabled = 1: must be true or false"),
        ("enable = true", "names.enable = true: is not a key podloom knows; did you mean enabled?"),
    ],
)
def test_faults_of_names(table: str, fault: str) -> None:
    (found,) = faults_of(text_of(MINIMAL) + f"\n[names]\n{table}")
    assert str(found).startswith(fault)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("", "service[0].name is missing: must be a DNS label"),
        ("name = 'a.b'", 'service[0].name = "a.b": must be a DNS label'),
        ("name = 'a'\nnamespace = ''", 'service[0].namespace = "": must be a DNS label'),
        ("name = 'a'\ncluster_ips = ['x']", 'service[0].cluster_ips[0] = "x": '),
        ("name = 'a'\ncluster_ips = ['::']", 'service[0].cluster_ips[0] = "::": must be one host'),
        ("name = 'a'\nexternal_name = '-'", 'service[0].external_name = "-": must be a DNS name'),
        ("name = 'a'\nports = [80]", "service[0].ports[0] = 80: must be a table of port, name, protocol"),
        ("name = 'a'\nports = [{}]", "service[0].ports[0].port is missing: must be an integer"),
        ("name = 'a'\nports = [{port = 0}]", "service[0].ports[0].port = 0: must be an integer from 1"),
        ("name = 'a'\nports = [{port = 1, x = 1}]", "service[0].ports[0].x = 1: is not a key"),
        ("name = 'a'\nendpoints = [{hostname = 'x'}]", "service[0].endpoints[0].addresses is missing"),
        (
            "name = 'a'\ncluster_ips = ['10.0.0.1']\nexternal_name = 'b'",
            'service[0] = "a": must have only one of cluster_ips, external_name',
        ),
        (
            "name = 'a'\n[[service]]\nname = 'a'",
            'service[1] = "default/a": must not be there twice',
        ),
    ],
)
def test_faults_of_services(row: str, fault: str) -> None:
    (found,) = faults_of(text_of(MINIMAL) + f"\n[[service]]\n{row}")
    assert str(found).startswith(fault)


@pytest.mark.parametrize("rows", ["service = 1", "service = [1]", "[service]\nname = 'a'"])
def test_services_are_tables(rows: str) -> None:
    faults: list[Fault] = []
    assert read_services(tomllib.loads(rows), "cluster.local", faults) == ()
    assert [fault.key for fault in faults] == ["service"]


@dataclass
class Held:
    address: object


@dataclass
class Attached:
    pod_namespace: str
    pod_name: str
    leases: list[Held]
    aliases: tuple[str, ...] = ()


def test_pods_are_what_the_runtime_named() -> None:
    one, two, three = map(ip_address, ("10.42.1.2", "fd42::2", "10.42.1.3"))
    records = [
        Attached("shop", "web-0", [Held(one), Held(two)]),
        Attached("", "", [Held(three)]),
        Attached("", "lonely", [Held(three)]),
        Attached("shop", "web-0", [Held(three)], ("front", "web-0")),
        Attached("", "", [Held(one)], ("db", "store")),
    ]
    assert pods_of(records) == (  # type: ignore[arg-type]
        Pod("web-0", (one, two, three), "shop", ("front",)),
        Pod("lonely", (three,), "default"),
        Pod("db", (one,), "default", ("store",)),
    )
