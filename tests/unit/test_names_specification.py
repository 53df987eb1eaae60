"""The Kubernetes DNS specification (kubernetes/dns docs/specification.md, schema 1.1.0) as one table: objects
as an API server has them, questions as a pod asks them, and a mark for each record.

`make test ARGS='-s tests/unit/test_names_specification.py'` prints it.
"""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network
from typing import Any, Final, NamedTuple

import dns.message
import dns.rcode
import dns.rrset

from forwarder.names.kubernetes import SERVICE_LABEL, ServiceTable
from forwarder.names.limits import Limiter
from forwarder.names.records import Pod, Replace
from forwarder.names.resolver import Resolver
from forwarder.names.upstream import Upstream
from forwarder.names.wire import Question
from forwarder.names.zone import Zone

CLIENT: Final = "10.42.1.5"


def service(name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "resourceVersion": "7"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoint_slice(name: str, of: str, kind: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "labels": {SERVICE_LABEL: of}}
    return {"metadata": metadata, "addressType": kind, "endpoints": list(endpoints)}


def backend(address: str, hostname: str | None = None, *, ready: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"addresses": [address], "conditions": {"ready": ready}}
    return found | ({"hostname": hostname} if hostname else {})


HTTP: Final = [
    {"name": "http", "port": 80, "protocol": "TCP"},
    {"name": "stat", "port": 9, "protocol": "UDP"},
]

SERVICES: Final = [
    service(
        "web", clusterIP="10.43.0.10", clusterIPs=["10.43.0.10", "fd43::10"], ports=[*HTTP, {"port": 8443}]
    ),
    service("db", clusterIP="None", clusterIPs=["None"], ports=HTTP),
    service("eager", clusterIP="None", publishNotReadyAddresses=True, ports=HTTP),
    service("asleep", clusterIP="None", ports=HTTP),
    service("mail", type="ExternalName", externalName="smtp.example.com"),
    service("inner", type="ExternalName", externalName="web.shop.svc.cluster.local"),
]

SLICES: Final = [
    # What the API makes of pods with `hostname: db-0` and `subdomain: db`, and of one without.
    endpoint_slice("db-4", "db", "IPv4", backend("10.42.1.20", "db-0"), backend("10.42.2.20", "db-1")),
    endpoint_slice("db-5", "db", "IPv4", backend("10.42.3.20"), backend("10.42.4.20", "db-3", ready=False)),
    endpoint_slice("db-6", "db", "IPv6", backend("fd42::20", "db-0")),
    endpoint_slice("eager-4", "eager", "IPv4", backend("10.42.4.21", "eager-0", ready=False)),
    endpoint_slice("asleep-4", "asleep", "IPv4", backend("10.42.4.22", ready=False)),
]

PODS: Final = (Pod("web-0", (ip_address(CLIENT), ip_address("fd42::5")), "shop"),)


class Row(NamedTuple):
    """`expected` are an answer's values, or the rcode of an empty one; `additional` the owners there."""

    section: str
    what: str
    name: str
    rdtype: str
    expected: list[str] | str
    additional: tuple[str, ...] = ()


def hosts(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.shop.svc.cluster.local." for name in names)


TABLE: Final = [
    Row("2.2", "schema version", "dns-version", "TXT", ['"1.1.0"']),
    Row("2.3.1", "ClusterIP, A", "web.shop.svc", "A", ["10.43.0.10"]),
    Row("2.3.1", "ClusterIP, AAAA", "web.shop.svc", "AAAA", ["fd43::10"]),
    Row(
        "2.3.2",
        "SRV of a TCP port",
        "_http._tcp.web.shop.svc",
        "SRV",
        ["0 100 80 web.shop.svc"],
        hosts("web"),
    ),
    Row(
        "2.3.2", "SRV of a UDP port", "_stat._udp.web.shop.svc", "SRV", ["0 100 9 web.shop.svc"], hosts("web")
    ),
    Row("2.3.2", "no SRV of an unnamed port", "_8443._tcp.web.shop.svc", "SRV", "NXDOMAIN"),
    Row("2.3.3", "PTR of a ClusterIP", "10.43.0.10", "PTR", ["web.shop.svc"]),
    Row("2.3.3", "PTR of an IPv6 ClusterIP", "fd43::10", "PTR", ["web.shop.svc"]),
    Row("2.4.1", "headless, A: all ready", "db.shop.svc", "A", ["10.42.1.20", "10.42.2.20", "10.42.3.20"]),
    Row("2.4.1", "headless, AAAA", "db.shop.svc", "AAAA", ["fd42::20"]),
    Row("2.4.1", "hostname and subdomain, A", "db-0.db.shop.svc", "A", ["10.42.1.20"]),
    Row("2.4.1", "hostname and subdomain, AAAA", "db-0.db.shop.svc", "AAAA", ["fd42::20"]),
    Row("2.4.1", "hostname of one not ready", "db-3.db.shop.svc", "A", "NXDOMAIN"),
    Row("2.4.1", "assigned hostname", "10-42-3-20.db.shop.svc", "A", ["10.42.3.20"]),
    Row("2.4.1", "nothing ready", "asleep.shop.svc", "A", "NXDOMAIN"),
    Row("2.4.1", "publishNotReadyAddresses", "eager.shop.svc", "A", ["10.42.4.21"]),
    Row("2.4.1", "its hostname", "eager-0.eager.shop.svc", "A", ["10.42.4.21"]),
    Row(
        "2.4.2",
        "headless, SRV of each",
        "_http._tcp.db.shop.svc",
        "SRV",
        [f"0 100 80 {host}.db.shop.svc" for host in ("db-0", "db-1", "10-42-3-20")],
        hosts("db-0.db", "db-1.db", "10-42-3-20.db"),
    ),
    Row("2.4.2", "no SRV while nothing is ready", "_http._tcp.asleep.shop.svc", "SRV", "NXDOMAIN"),
    Row("2.4.3", "PTR of a ready endpoint", "10.42.1.20", "PTR", ["db-0.db.shop.svc"]),
    Row("2.4.3", "PTR, IPv6", "fd42::20", "PTR", ["db-0.db.shop.svc"]),
    Row("2.4.3", "no PTR of one not ready", "10.42.4.20", "PTR", "NXDOMAIN"),
    Row("2.5", "ExternalName, CNAME", "mail.shop.svc", "CNAME", ["smtp.example.com"]),
    Row("2.5", "ExternalName, followed upstream", "mail.shop.svc", "A", ["smtp.example.com", "192.0.2.25"]),
    Row("2.5", "ExternalName, within", "inner.shop.svc", "A", ["web.shop.svc", "10.43.0.10"]),
    Row("2.6", "pod by its IPv4 address", "10-42-1-5.shop.pod", "A", ["10.42.1.5"]),
    Row("2.6", "pod by its IPv6 address", "fd42--5.shop.pod", "AAAA", ["fd42::5"]),
    Row("ours", "pod by its name", "web-0.shop.pod", "A", ["10.42.1.5"]),
    Row("ours", "PTR of a pod", "10.42.1.5", "PTR", ["web-0.shop.pod"]),
    Row("RFC 2308", "other type of a name", "web.shop.svc", "MX", "NOERROR"),
    Row("RFC 2308", "other family of a name", "10-42-3-20.db.shop.svc", "AAAA", "NOERROR"),
    Row("RFC 8020", "a name between names", "shop.svc", "A", "NOERROR"),
    Row("RFC 2308", "no such service", "absent.shop.svc", "A", "NXDOMAIN"),
    Row("RFC 2308", "no such namespace", "web.absent.svc", "A", "NXDOMAIN"),
]


def whole(name: str) -> str:
    """A name of the table as it is on the wire: of an address the reverse name, of ours the full one."""
    try:
        return f"{ip_address(name).reverse_pointer}."
    except ValueError:
        return f"{name}." if name.endswith(".com") else f"{name}.cluster.local."


class Smtp(Upstream):
    """Knows smtp.example.com, and is asked for nothing else."""

    def __init__(self) -> None:
        super().__init__(tuple)

    async def ask(self, question: Question) -> dns.message.Message:
        assert question.name.to_text() == "smtp.example.com."
        reply = dns.message.make_response(dns.message.make_query(question.name, "A"))
        reply.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", "192.0.2.25"))
        return reply


def resolver() -> Resolver:
    zone = Zone("cluster.local", (ip_address("10.42.1.1"),), (ip_network("10.42.0.0/16"),))
    assert zone.apply("kubernetes", ServiceTable().replace(SERVICES, SLICES)) == []
    assert zone.apply("pods", Replace(PODS)) == []
    limiter = Limiter((ip_network("10.42.1.0/24"),), 1e6)
    return Resolver(zone, limiter, Smtp(), 1 << 20, lambda: 0.0)


async def ask(asked: Resolver, row: Row, *, over_tcp: bool) -> str:
    """What is wrong with the answer; nothing if it is as the table has it."""
    query = dns.message.make_query(whole(row.name), row.rdtype, use_edns=0, payload=4096)
    data = asked.receive(query.to_wire(), CLIENT, 0.0, over_tcp=over_tcp)
    if data is not None and not isinstance(data, bytes):
        data = await data
    assert data is not None
    reply = dns.message.from_wire(data)
    assert query.is_response(reply)
    values = [str(rdata) for rrset in reply.answer for rdata in rrset]
    if isinstance(row.expected, str):
        soa = [rrset for rrset in reply.authority if rrset.rdtype.name == "SOA"]
        found = f"{dns.rcode.to_text(reply.rcode())} {values}{'' if soa else ', and no SOA'}"
        return "" if found == f"{row.expected} []" else found
    expected = sorted(whole_value(value) for value in row.expected)
    if reply.rcode() != dns.rcode.NOERROR or sorted(values) != expected:
        return f"{dns.rcode.to_text(reply.rcode())} {values}"
    owners = {rrset.name.to_text() for rrset in reply.additional}
    return "" if owners == set(row.additional) else f"additional {sorted(owners)}"


def whole_value(value: str) -> str:
    """The last word is a name unless it is an address or text."""
    rest, space, last = value.rpartition(" ")
    if last.startswith('"') or (not space and is_address(last)):
        return value
    return f"{rest}{space}{whole(last)}"


def is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def test_every_record_of_the_specification() -> None:
    async def judge() -> list[str]:
        asked = resolver()
        return [
            await ask(asked, row, over_tcp=False) or await ask(asked, row, over_tcp=True) for row in TABLE
        ]

    faults = asyncio.run(judge())
    print()  # noqa: T201
    for row, fault in zip(TABLE, faults, strict=True):
        mark = f"FAIL: {fault}" if fault else "pass"
        print(f"{row.section:9}{row.what:33}{row.rdtype:6}{row.name:28}{mark}")  # noqa: T201
    print(f"{faults.count('')} of {len(TABLE)}")  # noqa: T201
    assert not any(faults)
