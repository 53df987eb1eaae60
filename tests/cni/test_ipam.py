"""Which address comes next, against an oracle that tries them one by one; and the store around it."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.ipam import IpAddress, Pool, choose
from cni.netconf import QUARANTINE_S
from cni.request import Attachment
from cni.store import FILE_NAME, Holder, PoolExhaustedError, Store, StoreError

BOOT = "boot-1"


def pool_of(prefix: str, gateway: str | None = None) -> Pool:
    network = ip_network(prefix)
    return Pool.of_prefix(network, ip_address(gateway) if gateway else network[1])


def naive_choice(pool: Pool, last: IpAddress | None, taken: set[int]) -> IpAddress | None:
    """Every address after `last`, then from the start: the first that is neither taken nor the gateway."""
    low, high = int(pool.low), int(pool.high)
    start = low if last is None or not low <= int(last) <= high else int(last) + 1
    for number in itertools.chain(range(start, high + 1), range(low, start)):
        if number not in taken and number != int(pool.gateway):
            return type(pool.low)(number)
    return None


@given(
    prefix=st.sampled_from(
        ["10.0.0.0/28", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.0/32", "fd00::/124", "fd00::/127"]
    ),
    gateway=st.integers(0, 20),
    taken=st.sets(st.integers(0, 20)),
    last=st.none() | st.integers(0, 20),
)
def test_choose_is_what_trying_one_by_one_gives(
    prefix: str, gateway: int, taken: set[int], last: int | None
) -> None:
    base = ip_network(prefix).network_address
    pool = Pool.of_prefix(ip_network(prefix), base + gateway)
    numbers = {int(base) + offset for offset in taken}
    previous = None if last is None else base + last

    def taken_within(first: int, end: int) -> Iterable[int]:
        return sorted(number for number in numbers if first <= number <= end)

    assert choose(pool, previous, taken_within) == naive_choice(pool, previous, numbers)


@pytest.mark.parametrize(
    ("prefix", "low", "high"),
    [("10.0.0.0/24", "10.0.0.1", "10.0.0.254"), ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff")],
)
def test_network_and_broadcast_are_not_in_the_pool(prefix: str, low: str, high: str) -> None:
    pool = pool_of(prefix)
    assert (str(pool.low), str(pool.high)) == (low, high)


def attachment(number: int) -> Attachment:
    return Attachment("podnet", f"c{number}", "eth0")


class Reserver:
    """A store and a count of its attachments."""

    def __init__(self, state_dir: Path, *pools: Pool, boot: str = BOOT, now: float = 1000.0) -> None:
        self.store = Store(state_dir, boot, now)
        self.pools = pools
        self.number = 0

    def reserve(self, now: float = 1000.0) -> tuple[str, ...]:
        self.number += 1
        leases = self.store.reserve(
            attachment(self.number),
            Holder(f"pl{self.number}", "loom0"),
            [(pool,) for pool in self.pools],
            now,
        )
        return tuple(str(lease.address) for lease in leases)


def test_addresses_go_round_before_one_is_used_again(tmp_path: Path) -> None:
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/28"))
    given_out = []
    for number in range(1, 40):
        now = 1000.0 + number * QUARANTINE_S * 2
        given_out.append(reserver.reserve(now)[0])
        reserver.store.release(attachment(number), now)
    hosts = [f"10.0.0.{host}" for host in range(2, 15)]
    assert given_out == hosts * 3
    reserver.store.close()


def test_a_released_address_rests_unless_it_is_the_last(tmp_path: Path) -> None:
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/29"))  # .2 to .6
    assert [reserver.reserve()[0] for _ in range(4)] == [f"10.0.0.{host}" for host in (2, 3, 4, 5)]
    reserver.store.release(attachment(2), 1010.0)
    reserver.store.release(attachment(1), 1020.0)
    assert reserver.reserve(1021.0) == ("10.0.0.6",)
    assert reserver.reserve(1022.0) == ("10.0.0.3",), "all others are held: the longest at rest comes"
    reserver.store.release(attachment(4), 1030.0)
    assert reserver.reserve(1020.0 + QUARANTINE_S + 1) == ("10.0.0.2",), "its rest is over, .5's is not"
    reserver.store.close()


def test_exhaustion_is_told_and_reserves_nothing(tmp_path: Path) -> None:
    reserver = Reserver(tmp_path, pool_of("fd00::/64"), pool_of("10.0.0.0/30"))
    assert reserver.reserve() == ("fd00::2", "10.0.0.2")
    with pytest.raises(PoolExhaustedError, match=r"10\.0\.0\.1 to 10\.0\.0\.2"):
        reserver.reserve()
    assert reserver.store.find(attachment(2)) is None
    reserver.store.release(attachment(1), 1000.0)
    assert reserver.reserve() == ("fd00::3", "10.0.0.2")
    reserver.store.close()


def test_an_ipv6_pool_is_not_enumerated(tmp_path: Path) -> None:
    """The largest prefix there is, with a gap-free run in it."""
    reserver = Reserver(tmp_path, pool_of("2000::/3"))
    assert [reserver.reserve()[0] for _ in range(3)] == ["2000::2", "2000::3", "2000::4"]
    reserver.store.close()


def test_families_do_not_meet_in_the_store(tmp_path: Path) -> None:
    """10.0.0.2 is 0a00:0002 and so begins some IPv6 addresses."""
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/29"), pool_of("a00::/16"))
    for _ in range(5):
        reserver.reserve()
    with pytest.raises(PoolExhaustedError, match=r"10\.0\.0\.1"):
        reserver.reserve()
    reserver.store.close()


def test_a_record_is_what_del_and_check_need(tmp_path: Path) -> None:
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/24"), pool_of("fd00::/64"))
    reserver.reserve()
    record = reserver.store.find(attachment(1))
    assert record is not None
    assert (record.host_ifname, record.bridge, record.attached_at) == ("pl1", "loom0", None)
    assert [(str(lease.address), str(lease.gateway)) for lease in record.leases] == [
        ("10.0.0.2", "10.0.0.1"),
        ("fd00::2", "fd00::1"),
    ]
    assert isinstance(record.leases[0].address, IPv4Address)
    assert isinstance(record.leases[1].address, IPv6Address)
    reserver.store.complete(attachment(1), 1001.0)
    completed = reserver.store.find(attachment(1))
    assert completed is not None
    assert completed.attached_at == 1001.0
    reserver.store.close()


def test_completing_what_was_deleted_meanwhile_is_an_error(tmp_path: Path) -> None:
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/24"))
    reserver.reserve()
    reserver.store.release(attachment(1), 1001.0)
    with pytest.raises(StoreError, match="DEL"):
        reserver.store.complete(attachment(1), 1002.0)
    reserver.store.close()


def test_a_new_boot_releases_the_last_ones(tmp_path: Path) -> None:
    before = Reserver(tmp_path, pool_of("10.0.0.0/24"))
    before.reserve()
    before.store.close()
    after = Reserver(tmp_path, pool_of("10.0.0.0/24"), boot="boot-2", now=2000.0)
    assert after.store.find(attachment(1)) is None
    assert after.reserve(2001.0) == ("10.0.0.3",)
    after.store.close()


def test_a_boot_begins_the_clock_anew(tmp_path: Path) -> None:
    """What rested by the last boot's clock rests again, but not until that clock's time comes."""
    before = Reserver(tmp_path, pool_of("10.0.0.0/29"), now=90_000.0)
    before.reserve(90_000.0)
    before.store.release(attachment(1), 90_000.0)
    before.store.close()
    after = Reserver(tmp_path, pool_of("10.0.0.0/29"), boot="boot-2", now=5.0)
    assert [after.reserve(5.0)[0] for _ in range(4)] == [f"10.0.0.{host}" for host in (3, 4, 5, 6)]
    after.store.release(attachment(4), 7.0)
    assert after.reserve(6.0 + QUARANTINE_S) == ("10.0.0.2",)
    after.store.close()


def test_a_store_of_version_1_is_taken_over(tmp_path: Path) -> None:
    """Pods of this boot stay, in a store that told the time since 1970; a GC may collect them later."""
    path = tmp_path / FILE_NAME
    database = sqlite3.connect(path)
    database.executescript(VERSION_1)
    for host, released_at in ((1, None), (2, 1.7e9)):
        address, gateway = bytes([10, 0, 0, host + 1]), bytes([10, 0, 0, 1])
        values = (4, address, gateway, "podnet", f"c{host}", "eth0", released_at)
        database.execute("INSERT INTO addresses VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    record_1 = ("podnet", "c1", "eth0", "pl1", "loom0", BOOT, "", "", None, 1.7e9, 1.7e9)
    database.execute("INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", record_1)
    database.commit()
    database.close()
    reserver = Reserver(tmp_path, pool_of("10.0.0.0/29"), now=500.0)
    record = reserver.store.find(attachment(1))
    assert record is not None
    assert (record.reserved_at, record.attached_at) == (500.0, 500.0)
    reserver.number = 10
    assert [reserver.reserve(501.0)[0] for _ in range(4)] == [f"10.0.0.{host}" for host in (4, 5, 6, 3)]
    reserver.store.close()


VERSION_1 = """
CREATE TABLE attachments (
    network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
    host_ifname TEXT NOT NULL, bridge TEXT NOT NULL, boot_id TEXT NOT NULL,
    pod_namespace TEXT NOT NULL, pod_name TEXT NOT NULL,
    mac TEXT UNIQUE, reserved_at REAL NOT NULL, attached_at REAL,
    PRIMARY KEY (network, container, ifname)
) WITHOUT ROWID;
CREATE TABLE addresses (
    family INTEGER NOT NULL, address BLOB NOT NULL, gateway BLOB NOT NULL,
    network TEXT NOT NULL, container TEXT NOT NULL, ifname TEXT NOT NULL,
    released_at REAL,
    PRIMARY KEY (family, address)
) WITHOUT ROWID;
CREATE INDEX addresses_of_attachment ON addresses (network, container, ifname);
CREATE TABLE last_given (pool TEXT NOT NULL PRIMARY KEY, address BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


def test_what_has_rested_is_forgotten(tmp_path: Path) -> None:
    """An IPv6 pool never comes round: its past would fill the disk."""
    reserver = Reserver(tmp_path, pool_of("fd00::/64"))
    for number in range(1, 50):
        reserver.reserve(1000.0 + number * 10)
        reserver.store.release(attachment(number), 1000.0 + number * 10)
    rows = reserver.store._one("SELECT count(*) FROM addresses")[0]
    assert rows <= QUARANTINE_S / 10 + 1
    reserver.store.close()


def test_stores_of_several_processes_agree(tmp_path: Path) -> None:
    """Each thread with a connection of its own, as processes have."""
    given_out: list[str] = []

    def reserve(worker: int) -> None:
        store = Store(tmp_path, BOOT, 1000.0)
        for number in range(10):
            key = Attachment("podnet", f"w{worker}-{number}", "eth0")
            given_out.append(
                str(store.reserve(key, Holder("pl", "loom0"), [(pool_of("10.0.0.0/24"),)], 1000.0)[0].address)
            )
        store.close()

    threads = [threading.Thread(target=reserve, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given_out) == len(set(given_out)) == 40
