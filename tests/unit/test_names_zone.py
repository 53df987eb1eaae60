"""The zone against the Kubernetes DNS specification (kubernetes/dns docs/specification.md, schema 1.1.0)."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from forwarder.names.records import Endpoint, Key, Pod, Port, Put, Record, Remove, Replace, Service
from forwarder.names.zone import TTL_SECONDS, Found, Rr, Zone, address_of

DOMAIN = "cluster.local"
GATEWAYS = (ip_address("10.42.1.1"), ip_address("fd42:0:0:1::1"))
NETWORKS = (ip_network("10.42.0.0/16"), ip_network("fd42::/48"))

HTTPS = Port(443, "https")
RECORDS: tuple[Record, ...] = (
    Service(
        "kubernetes",
        cluster_ips=(ip_address("10.3.0.1"), ip_address("fd43::1")),
        ports=(HTTPS, Port(53, "dns", "udp"), Port(9999)),
    ),
    Service("only4", cluster_ips=(ip_address("10.3.0.2"),)),
    Service(
        "headless",
        ports=(HTTPS, Port(9999)),
        endpoints=(
            Endpoint((ip_address("10.42.1.10"), ip_address("fd42::a")), "my-pet"),
            Endpoint((ip_address("10.42.2.11"),), "my-pet-2"),
            Endpoint((ip_address("10.42.3.12"),)),
        ),
    ),
    Service("unready", ports=(HTTPS,)),
    Service("foo", external_name="www.example.com"),
    Service("inner", external_name="headless.default.svc.cluster.local."),
    Service("lost", external_name="absent.default.svc.cluster.local"),
    Service("loop-a", external_name="loop-b.default.svc.cluster.local"),
    Service("loop-b", external_name="loop-a.default.svc.cluster.local"),
    Pod("web-0", (ip_address("10.42.1.20"), ip_address("fd42::14")), "shop", aliases=("web", "w.x")),
    Pod("my.pod", (ip_address("10.42.1.21"),), "shop"),
)


@pytest.fixture
def zone() -> Zone:
    zone = Zone(DOMAIN, GATEWAYS, NETWORKS)
    assert zone.apply("test", Replace(RECORDS)) == []
    return zone


def values(found: Found | None) -> list[str]:
    assert found is not None
    return [rr.value for rr in found.answer]


SVC = "default.svc.cluster.local"

# section of the specification, question, type, values of the answer
SPECIFICATION = [
    ("2.2 schema version", "dns-version.cluster.local", "TXT", ['"1.1.0"']),
    ("2.3.1 A", f"kubernetes.{SVC}", "A", ["10.3.0.1"]),
    ("2.3.1 AAAA", f"kubernetes.{SVC}", "AAAA", ["fd43::1"]),
    ("2.3.2 SRV", f"_https._tcp.kubernetes.{SVC}", "SRV", [f"0 100 443 kubernetes.{SVC}."]),
    ("2.3.2 SRV of UDP", f"_dns._udp.kubernetes.{SVC}", "SRV", [f"0 100 53 kubernetes.{SVC}."]),
    ("2.3.3 PTR", "1.0.3.10.in-addr.arpa", "PTR", [f"kubernetes.{SVC}."]),
    ("2.3.3 PTR of IPv6", "1" + ".0" * 27 + ".3.4.d.f.ip6.arpa", "PTR", [f"kubernetes.{SVC}."]),
    ("2.4.1 A", f"headless.{SVC}", "A", ["10.42.1.10", "10.42.2.11", "10.42.3.12"]),
    ("2.4.1 AAAA", f"headless.{SVC}", "AAAA", ["fd42::a"]),
    ("2.4.1 A of a hostname", f"my-pet.headless.{SVC}", "A", ["10.42.1.10"]),
    ("2.4.1 AAAA of a hostname", f"my-pet.headless.{SVC}", "AAAA", ["fd42::a"]),
    ("2.4.1 A of an assigned hostname", f"10-42-3-12.headless.{SVC}", "A", ["10.42.3.12"]),
    (
        "2.4.2 SRV",
        f"_https._tcp.headless.{SVC}",
        "SRV",
        [f"0 100 443 {host}.headless.{SVC}." for host in ("my-pet", "my-pet-2", "10-42-3-12")],
    ),
    ("2.4.3 PTR", "10.1.42.10.in-addr.arpa", "PTR", [f"my-pet.headless.{SVC}."]),
    ("2.4.3 PTR of IPv6", "a" + ".0" * 27 + ".2.4.d.f.ip6.arpa", "PTR", [f"my-pet.headless.{SVC}."]),
    ("2.4.3 PTR, assigned", "12.3.42.10.in-addr.arpa", "PTR", [f"10-42-3-12.headless.{SVC}."]),
    ("2.5 CNAME", f"foo.{SVC}", "CNAME", ["www.example.com."]),
    ("2.5 CNAME for A", f"foo.{SVC}", "A", ["www.example.com."]),
    ("2.6 pod by address", "1-2-3-4.any.pod.cluster.local", "A", ["1.2.3.4"]),
    ("2.6 pod by IPv6 address", "fd42--7.any.pod.cluster.local", "AAAA", ["fd42::7"]),
    ("ours: pod by name", "web-0.shop.pod.cluster.local", "A", ["10.42.1.20"]),
    ("ours: pod by name, AAAA", "web-0.shop.pod.cluster.local", "AAAA", ["fd42::14"]),
    ("ours: pod by alias", "web.shop.pod.cluster.local", "A", ["10.42.1.20"]),
    ("ours: pod by dotted alias", "w.x.shop.pod.cluster.local", "A", ["10.42.1.20"]),
    ("ours: pod with a dotted name", "my.pod.shop.pod.cluster.local", "A", ["10.42.1.21"]),
    ("ours: PTR of a pod", "20.1.42.10.in-addr.arpa", "PTR", ["web-0.shop.pod.cluster.local."]),
    ("apex NS", "cluster.local", "NS", ["ns.dns.cluster.local."]),
    ("name server", "ns.dns.cluster.local", "A", ["10.42.1.1"]),
]


@pytest.mark.parametrize(
    ("name", "rdtype", "expected"), [row[1:] for row in SPECIFICATION], ids=[row[0] for row in SPECIFICATION]
)
def test_records_of_the_specification(zone: Zone, name: str, rdtype: str, expected: list[str]) -> None:
    found = zone.look_up(name, rdtype)
    assert values(found) == expected
    assert found is not None
    assert found.rcode == "NOERROR"
    assert {(rr.owner, rr.ttl) for rr in found.answer} == {(name, TTL_SECONDS)}


# what, question, type, rcode; the answer is empty and the authority an SOA whose TTL bounds the caching
NEGATIVE = [
    ("unnamed port", f"__tcp.kubernetes.{SVC}", "SRV", "NXDOMAIN"),
    ("port of another protocol", f"_https._udp.kubernetes.{SVC}", "SRV", "NXDOMAIN"),
    ("no such service", f"absent.{SVC}", "A", "NXDOMAIN"),
    ("no such namespace", "web.absent.svc.cluster.local", "A", "NXDOMAIN"),
    ("nothing ready (2.4.1)", f"unready.{SVC}", "A", "NXDOMAIN"),
    ("other family", f"only4.{SVC}", "AAAA", "NOERROR"),
    ("other type", f"kubernetes.{SVC}", "MX", "NOERROR"),
    ("a namespace, between names", SVC, "A", "NOERROR"),
    ("svc, between names", "svc.cluster.local", "A", "NOERROR"),
    ("protocol, between names", f"_tcp.kubernetes.{SVC}", "SRV", "NOERROR"),
    ("apex", "cluster.local", "A", "NOERROR"),
    ("search list", f"www.example.com.{SVC}", "A", "NXDOMAIN"),
    ("pod by address, other family", "1-2-3-4.any.pod.cluster.local", "AAAA", "NOERROR"),
    ("not an address", "1-2-3-400.any.pod.cluster.local", "A", "NXDOMAIN"),
    ("an address, a label too many", "1-2-3-4.a.b.pod.cluster.local", "A", "NXDOMAIN"),
    ("unknown address of the cluster", "99.9.42.10.in-addr.arpa", "PTR", "NXDOMAIN"),
]


@pytest.mark.parametrize(
    ("name", "rdtype", "rcode"), [row[1:] for row in NEGATIVE], ids=[row[0] for row in NEGATIVE]
)
def test_what_is_not_there(zone: Zone, name: str, rdtype: str, rcode: str) -> None:
    found = zone.look_up(name, rdtype)
    assert found is not None
    assert (found.rcode, found.answer) == (rcode, ())
    (soa,) = found.authority
    assert (soa.type, soa.ttl) == ("SOA", TTL_SECONDS)
    assert name == soa.owner or name.endswith(f".{soa.owner}")
    assert int(soa.value.split()[-1]) == TTL_SECONDS


@pytest.mark.parametrize(
    "name",
    [
        "www.example.com",
        "local",
        "notcluster.local",
        "",
        "in-addr.arpa",
        "10.in-addr.arpa",
        "3.0.3.10.in-addr.arpa",
        "8.8.8.8.in-addr.arpa",
        "256.1.42.10.in-addr.arpa",
        "a.0.ip6.arpa",
    ],
)
def test_names_that_are_not_ours(zone: Zone, name: str) -> None:
    assert zone.look_up(name, "A") is None
    assert zone.look_up(name, "SOA") is None


def test_the_apex_has_an_soa_that_counts_changes(zone: Zone) -> None:
    before = values(zone.look_up(DOMAIN, "SOA"))[0].split()
    zone.apply("test", Remove(()))
    after = values(zone.look_up(DOMAIN, "SOA"))[0].split()
    assert int(after[2]) == int(before[2]) + 1


def test_reverse_zones_end_at_the_label_below_the_prefix() -> None:
    zone = Zone(DOMAIN, GATEWAYS, (ip_network("10.42.16.0/20"), ip_network("fd42:0:0:10::/60")))
    for address, origin in (("10.42.17.1", "42.10.in-addr.arpa"), ("fd42:0:0:11::1", None)):
        found = zone.look_up(ip_address(address).reverse_pointer, "PTR")
        assert found is not None
        expected = origin or ip_address(address).reverse_pointer[34:]
        assert found.authority[0].owner == expected
    assert ip_address("fd42:0:0:11::1").reverse_pointer[34:].count(".") == 60 // 4 + 1


def test_addresses_come_along_with_srv(zone: Zone) -> None:
    found = zone.look_up(f"_https._tcp.headless.{SVC}", "SRV")
    assert found is not None
    assert Rr(f"my-pet.headless.{SVC}", "A", "10.42.1.10") in found.additional
    assert Rr(f"my-pet.headless.{SVC}", "AAAA", "fd42::a") in found.additional
    assert len(found.additional) == 4


def test_an_external_name_outside_is_for_upstream_to_go_on_with(zone: Zone) -> None:
    found = zone.look_up(f"foo.{SVC}", "AAAA")
    assert found == Found(answer=(Rr(f"foo.{SVC}", "CNAME", "www.example.com."),), alias="www.example.com")
    asked_itself = zone.look_up(f"foo.{SVC}", "CNAME")
    assert asked_itself is not None
    assert asked_itself.alias == ""


def test_an_external_name_inside_is_followed(zone: Zone) -> None:
    found = zone.look_up(f"inner.{SVC}", "AAAA")
    assert found is not None
    assert [(rr.owner, rr.type) for rr in found.answer] == [
        (f"inner.{SVC}", "CNAME"),
        (f"headless.{SVC}", "AAAA"),
    ]
    lost = zone.look_up(f"lost.{SVC}", "A")
    assert lost is not None
    assert (lost.rcode, len(lost.answer), lost.authority[0].type) == ("NXDOMAIN", 1, "SOA")


def test_a_loop_of_external_names_ends(zone: Zone) -> None:
    found = zone.look_up(f"loop-a.{SVC}", "A")
    assert found is not None
    assert found.rcode == "SERVFAIL"
    assert 0 < len(found.answer) <= 8


def test_any_gets_one_rrset(zone: Zone) -> None:
    assert values(zone.look_up(f"kubernetes.{SVC}", "ANY")) == ["10.3.0.1"]
    assert values(zone.look_up(f"foo.{SVC}", "ANY")) == ["www.example.com."]


def test_changes_leave_no_trace() -> None:
    zone = Zone(DOMAIN, GATEWAYS, NETWORKS)
    empty = list(zone.listing())
    zone.apply("a", Replace(RECORDS))
    zone.apply("b", Replace(RECORDS))
    full = list(zone.listing())
    zone.apply("b", Remove(tuple(record.key for record in RECORDS)))
    assert list(zone.listing()) == full
    for record in RECORDS:
        zone.apply("a", Remove((record.key,)))
    assert list(zone.listing()) == empty
    assert zone.look_up("svc.cluster.local", "A") == zone.look_up("svc.cluster.local", "AAAA")
    assert zone.look_up("svc.cluster.local", "A").rcode == "NXDOMAIN"  # type: ignore[union-attr]


def test_sources_add_up_and_keys_are_replaced() -> None:
    zone = Zone(DOMAIN, GATEWAYS)
    name = f"db.{SVC}"
    zone.apply("static", Put((Service("db", cluster_ips=(ip_address("10.3.0.9"),)),)))
    zone.apply("etcd", Put((Service("db", cluster_ips=(ip_address("10.3.0.8"),)),)))
    assert values(zone.look_up(name, "A")) == ["10.3.0.9", "10.3.0.8"]
    zone.apply("etcd", Put((Service("db", cluster_ips=(ip_address("10.3.0.7"),)),)))
    assert values(zone.look_up(name, "A")) == ["10.3.0.9", "10.3.0.7"]
    zone.apply("etcd", Replace(()))
    assert values(zone.look_up(name, "A")) == ["10.3.0.9"]
    zone.apply("static", Remove((Key("service", "default", "db"), Key("pod", "x", "unknown"))))
    assert zone.look_up(name, "A").rcode == "NXDOMAIN"  # type: ignore[union-attr]


def test_one_record_cannot_fill_the_memory() -> None:
    """Ports times backends: whoever may make a Service may give it thousands of both."""
    zone = Zone(DOMAIN, GATEWAYS)
    ports = tuple(Port(number, f"p{number}") for number in range(1, 1001))
    backends = tuple(Endpoint((ip_address("10.42.0.0") + number,)) for number in range(1000))
    (refused,) = zone.apply("test", Replace((Service("bomb", ports=ports, endpoints=backends),)))
    assert refused == ("service/default/bomb: it makes 1003000 resource records, and must make at most 65536")
    few = Service("few", ports=ports[:10], endpoints=backends)
    assert zone.apply("test", Replace((few,))) == []
    assert sum(1 for _ in zone.listing()) - sum(1 for _ in Zone(DOMAIN, GATEWAYS).listing()) == 13_000


def test_a_full_zone_takes_no_more_and_goes_on() -> None:
    zone = Zone(DOMAIN, GATEWAYS, max_rrs=10)
    services = [Service(f"s{number}", cluster_ips=(ip_address("10.3.0.0") + number,)) for number in range(9)]
    refused = zone.apply("test", Replace(tuple(services)))
    assert refused[0] == "service/default/s3: the zone is full with 10 resource records"
    assert len(refused) == 6
    assert values(zone.look_up(f"s2.{SVC}", "A")) == ["10.3.0.2"]
    zone.apply("test", Remove((services[0].key,)))
    assert zone.apply("test", Put((services[3],))) == []
    moved = Service("s1", cluster_ips=(ip_address("10.9.0.1"),))
    assert zone.apply("test", Put((moved,))) == [], "what is there may change"


LONG = "a" * 63
OWN = ip_address("10.42.1.9")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Service("-x"), "service/default/-x: name '-x' must be a DNS label"),
        (Service("a.b"), "name 'a.b' must be a DNS label"),
        (Service("x\n"), r"name 'x\n' must be a DNS label"),
        (Service("ü"), "must be a DNS label"),
        (Service("x", "Bad Space"), "namespace 'Bad Space' must be a DNS label"),
        (Service("x", external_name="a..b"), "external name 'a..b' must be a DNS name"),
        (Service("x", external_name=".".join([LONG] * 4)), "at most 253 characters"),
        (Service("x", endpoints=(Endpoint((OWN,), "a.b"),)), "hostname 'a.b' must be a DNS label"),
        (Service("x", ports=(Port(1, "p" * 16),)), "must be 1 to 15 letters, digits and hyphens"),
        (Service("x", ports=(Port(1, "p", "icmp"),)), "protocol 'icmp' must be tcp or udp or sctp"),
        (Pod("x" * 64, (OWN,)), "must be a DNS name"),
        (Pod(".".join([LONG] * 4), (OWN,)), "at most 253 characters"),
        (Pod("x", (OWN,), aliases=("_",)), "alias '_' must be a DNS name"),
    ],
)
def test_a_refused_record_does_not_stop_the_rest(bad: Record, reason: str) -> None:
    zone = Zone(DOMAIN, GATEWAYS)
    good = Service("good", cluster_ips=(ip_address("10.3.0.1"),))
    (refused,) = zone.apply("test", Replace((bad, good)))
    assert reason in refused
    assert values(zone.look_up(f"good.{SVC}", "A")) == ["10.3.0.1"]


def test_what_was_known_of_a_refused_record_stays() -> None:
    zone = Zone(DOMAIN, GATEWAYS)
    zone.apply("test", Replace((Service("db", cluster_ips=(ip_address("10.3.0.1"),)),)))
    bad = Service("db", cluster_ips=(ip_address("10.3.0.2"),), ports=(Port(1, "no good name"),))
    assert len(zone.apply("test", Replace((bad,)))) == 1
    assert values(zone.look_up(f"db.{SVC}", "A")) == ["10.3.0.1"]


@pytest.mark.parametrize("address", ["10.0.0.255", "0.0.0.0", "fd42::1", "::", "ffff::ffff"])
def test_reverse_names(address: str) -> None:
    assert address_of(ip_address(address).reverse_pointer) == ip_address(address)
