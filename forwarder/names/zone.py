"""Records in, answers out: the cluster's names after the Kubernetes DNS specification, version 1.1.0. Pure.

Names are lower-case text without the final dot, types are text ("A"), and so are values as in a zone file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

from forwarder.addresses import Address, Network
from forwarder.names.records import Change, Key, Pod, Put, Record, Remove, Replace, Service, refusal

SCHEMA_VERSION: Final = "1.1.0"
TTL_SECONDS: Final = 5
"""Short, since pods move; a client that asks again costs little here. CoreDNS has the same default."""

MAX_RRS: Final = 500_000
"""In all: some 200 MB."""

MAX_ALIASES: Final = 8
"""CNAMEs followed within the zone: more is a loop, or as good as one."""

NOERROR: Final = "NOERROR"
NXDOMAIN: Final = "NXDOMAIN"
SERVFAIL: Final = "SERVFAIL"

_REVERSE_SUFFIX: Final = {4: ".in-addr.arpa", 6: ".ip6.arpa"}
_ADDRESS_TYPE: Final = {4: "A", 6: "AAAA"}


class Rr(NamedTuple):
    """One resource record."""

    owner: str
    type: str
    value: str
    ttl: int = TTL_SECONDS


@dataclass(frozen=True, slots=True)
class Found:
    """An answer. `alias` is set when it goes on at a name that is not ours."""

    rcode: str = NOERROR
    answer: tuple[Rr, ...] = ()
    authority: tuple[Rr, ...] = ()
    additional: tuple[Rr, ...] = ()
    alias: str = ""


class Zone:
    """The names below `domain`, and the reverse names of `networks` and of every address with a name."""

    def __init__(
        self,
        domain: str,
        addresses: Sequence[Address],
        networks: Sequence[Network] = (),
        expected: Sequence[str] = (),
        max_rrs: int = MAX_RRS,
    ) -> None:
        """`addresses` are the resolver's own. Until all `expected` sources have been heard, nothing is said
        not to exist. There are at most `max_rrs` resource records."""
        self._count, self._max_rrs = 0, max_rrs
        self.domain = domain.lower().removesuffix(".")
        self._networks = tuple(networks)
        self._unheard = set(expected)
        self._serial = 1
        self._sources: dict[str, dict[Key, tuple[Rr, ...]]] = {}
        # By owner, type and value, how many records say so.
        self._values: dict[str, dict[str, dict[str, int]]] = {}
        # By name, how many owners are at it or below: a name with some below exists, though empty.
        self._population: dict[str, int] = {}
        server = f"ns.dns.{self.domain}"
        own = [Rr(server, _ADDRESS_TYPE[address.version], str(address)) for address in addresses]
        self._insert(Rr(f"dns-version.{self.domain}", "TXT", f'"{SCHEMA_VERSION}"'))
        for rr in (*own, Rr(self.domain, "NS", f"{server}.")):
            self._insert(rr)

    # Records in

    def apply(self, source: str, change: Change) -> list[str]:
        """Take over what a source says. A sentence for each record that is refused: the rest applies, and
        what was known of that one stays."""
        self._serial += 1
        self._unheard.discard(source)
        known = self._sources.setdefault(source, {})
        match change:
            case Remove(keys):
                for key in keys:
                    self._forget(known, key)
                return []
            case Replace(records):
                for key in known.keys() - {record.key for record in records}:
                    self._forget(known, key)
                if not records:
                    del self._sources[source]  # Sources come and go with nodes.
                return self._put(known, records)
            case Put(records):
                return self._put(known, records)

    def _put(self, known: dict[Key, tuple[Rr, ...]], records: Sequence[Record]) -> list[str]:
        refused = []
        for record in records:
            if reason := refusal(record, self.domain):
                refused.append(f"{record.key}: {reason}")
                continue
            rrs = tuple(dict.fromkeys(rrs_of(record, self.domain)))
            more = len(rrs) - len(known.get(record.key, ()))
            if more > 0 and self._count + more > self._max_rrs:
                refused.append(f"{record.key}: the zone is full with {self._count} resource records")
                continue
            if known.get(record.key, ()) != rrs:
                self._forget(known, record.key)
                for rr in rrs:
                    self._insert(rr)
            if rrs:
                known[record.key] = rrs
        return refused

    def _forget(self, known: dict[Key, tuple[Rr, ...]], key: Key) -> None:
        for rr in known.pop(key, ()):
            self._remove(rr)

    def _insert(self, rr: Rr) -> None:
        if rr.owner not in self._values:
            self._populate(rr.owner, 1)
        values = self._values.setdefault(rr.owner, {}).setdefault(rr.type, {})
        values[rr.value] = values.get(rr.value, 0) + 1
        self._count += 1

    def _remove(self, rr: Rr) -> None:
        types = self._values[rr.owner]
        values = types[rr.type]
        values[rr.value] -= 1
        self._count -= 1
        if not values[rr.value]:
            del values[rr.value]
        if not values:
            del types[rr.type]
        if not types:
            del self._values[rr.owner]
            self._populate(rr.owner, -1)

    def _populate(self, owner: str, step: int) -> None:
        name = owner
        while name:
            count = self._population.get(name, 0) + step
            if count:
                self._population[name] = count
            else:
                del self._population[name]
            name = name.partition(".")[2]

    # Answers out

    def look_up(self, name: str, rdtype: str) -> Found | None:
        """The answer, or None where the name is not ours."""
        chain: list[Rr] = []
        while (origin := self._origin(name)) is not None:
            types = self._types_at(name)
            if "CNAME" in types and rdtype not in ("CNAME", "ANY"):
                if len(chain) == MAX_ALIASES:
                    return Found(SERVFAIL, tuple(chain))
                (target, *_) = types["CNAME"]
                chain.append(Rr(name, "CNAME", target))
                name = target.removesuffix(".").lower()
                continue
            if name == origin:
                types = types | {"SOA": [self._soa(origin).value]}
            if rdtype == "ANY" and types:
                rdtype = min(types)  # One RRset is enough, RFC 8482 section 4.1.
            if rdtype in types:
                found = tuple(Rr(name, rdtype, value) for value in types[rdtype])
                return Found(answer=(*chain, *found), additional=self._targets(found))
            exists = bool(types) or name in self._population
            if self._unheard and not exists:
                return Found(SERVFAIL, tuple(chain))
            return Found(NOERROR if exists else NXDOMAIN, tuple(chain), (self._soa(origin),))
        return Found(answer=tuple(chain), alias=name) if chain else None

    def listing(self) -> Iterator[Rr]:
        """Every record, sorted by owner and type."""
        for owner, types in sorted(self._values.items()):
            for rdtype, values in sorted(types.items()):
                for value in values:
                    yield Rr(owner, rdtype, value)

    def _origin(self, name: str) -> str | None:
        """The zone of ours that a name is in."""
        if name == self.domain or name.endswith(f".{self.domain}"):
            return self.domain
        address = address_of(name)
        if address is None:
            return None
        for network in self._networks:
            if address in network:
                return _reverse_zone(address, network.prefixlen)
        return _reverse_zone(address, address.max_prefixlen) if name in self._values else None

    def _types_at(self, name: str) -> dict[str, list[str]]:
        types = {rdtype: list(values) for rdtype, values in self._values.get(name, {}).items()}
        if not types and (address := self._spelled_address(name)) is not None:
            types[_ADDRESS_TYPE[address.version]] = [str(address)]
        return types

    def _spelled_address(self, name: str) -> Address | None:
        """Section 2.6: `<a>-<b>-<c>-<d>.<namespace>.pod.<domain>`, for any address and namespace."""
        first, _, rest = name.partition(".")
        namespace = rest.removesuffix(f".pod.{self.domain}")
        if namespace == rest or "." in namespace or "-" not in first:
            return None
        if re.fullmatch(r"\d+-\d+-\d+-\d+", first):
            spelled = first.replace("-", ".")
        else:
            spelled = first.replace("-", ":")
        try:
            return ip_address(spelled)
        except ValueError:
            return None

    def _targets(self, found: Sequence[Rr]) -> tuple[Rr, ...]:
        """The addresses that SRV and NS records lead to."""
        targets = [rr.value.rpartition(" ")[2].removesuffix(".") for rr in found if rr.type in ("SRV", "NS")]
        return tuple(
            Rr(target, rdtype, value)
            for target in dict.fromkeys(targets)
            for rdtype in ("A", "AAAA")
            for value in self._values.get(target, {}).get(rdtype, {})
        )

    def _soa(self, origin: str) -> Rr:
        numbers = f"{self._serial} 7200 1800 86400 {TTL_SECONDS}"
        return Rr(origin, "SOA", f"ns.dns.{self.domain}. hostmaster.{self.domain}. {numbers}")


def rrs_of(record: Record, domain: str) -> Iterator[Rr]:
    """What one record puts into the DNS. It is one that `records.refusal` has nothing against."""
    if isinstance(record, Pod):
        base = f"{record.namespace}.pod.{domain}".lower()
        for name in (record.name, *record.aliases):
            yield from _addresses(f"{name.lower()}.{base}", record.addresses)
        yield from _pointers(record.addresses, f"{record.name.lower()}.{base}")
        return
    service = f"{record.name}.{record.namespace}.svc.{domain}".lower()
    if record.external_name:
        yield Rr(service, "CNAME", record.external_name.removesuffix(".").lower() + ".")
    elif record.cluster_ips:
        yield from _addresses(service, record.cluster_ips)
        yield from _services(record, service, service)
        yield from _pointers(record.cluster_ips, service)
    else:
        for endpoint in record.endpoints:
            for hostname, addresses in _hosts(endpoint.hostname.lower(), endpoint.addresses):
                host = f"{hostname}.{service}"
                yield from _addresses(service, addresses)
                yield from _addresses(host, addresses)
                yield from _services(record, service, host)
                yield from _pointers(addresses, host)


def _hosts(hostname: str, addresses: Sequence[Address]) -> Iterator[tuple[str, Sequence[Address]]]:
    if hostname:
        yield hostname, addresses
    else:
        for address in addresses:
            yield re.sub(r"[.:]", "-", address.exploded), (address,)


def _addresses(owner: str, addresses: Sequence[Address]) -> Iterator[Rr]:
    for address in addresses:
        yield Rr(owner, _ADDRESS_TYPE[address.version], str(address))


def _services(record: Service, service: str, target: str) -> Iterator[Rr]:
    for port in record.ports:
        if port.name:
            owner = f"_{port.name.lower()}._{port.protocol}.{service}"
            yield Rr(owner, "SRV", f"0 100 {port.port} {target}.")


def _pointers(addresses: Sequence[Address], target: str) -> Iterator[Rr]:
    for address in addresses:
        yield Rr(address.reverse_pointer, "PTR", f"{target}.")


def address_of(name: str) -> Address | None:
    """The address that a reverse name stands for, RFC 1035 section 3.5 and RFC 3596 section 2.5."""
    if name.endswith(_REVERSE_SUFFIX[4]):
        labels = name.removesuffix(_REVERSE_SUFFIX[4]).split(".")
        try:
            return IPv4Address(".".join(reversed(labels)))
        except ValueError:
            return None
    if name.endswith(_REVERSE_SUFFIX[6]):
        labels = name.removesuffix(_REVERSE_SUFFIX[6]).split(".")
        if len(labels) == 32 and all(re.fullmatch("[0-9a-f]", label) for label in labels):
            return IPv6Address(int("".join(reversed(labels)), 16))
    return None


def _reverse_zone(address: Address, prefix_length: int) -> str:
    """The reverse name of a network, whose length is rounded down to what names can tell apart."""
    bits = 8 if address.version == 4 else 4
    labels = address.reverse_pointer.split(".")
    return ".".join(labels[(address.max_prefixlen - prefix_length + bits - 1) // bits :])
