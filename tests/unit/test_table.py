import ipaddress

import pytest

from fastpath.table import LOCAL_SLOT, MAX_PEERS, PeerTable, PrefixTable

ROUTER_MAC = bytes.fromhex("020000000001")


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def insert(table: PrefixTable, prefix: str, slot: int) -> None:
    network = ipaddress.ip_network(prefix)
    table.insert(network.network_address.packed, network.prefixlen, slot)


def remove(table: PrefixTable, prefix: str) -> None:
    network = ipaddress.ip_network(prefix)
    table.remove(network.network_address.packed, network.prefixlen)


class TestPrefixTable:
    def test_an_empty_table_knows_nothing(self) -> None:
        table = PrefixTable()
        assert len(table) == 0
        assert table.lookup(packed("10.0.0.1")) is None
        assert table.lookup(packed("fd00::1")) is None

    def test_the_longest_prefix_wins_whatever_the_order(self) -> None:
        prefixes = {"0.0.0.0/0": 1, "10.0.0.0/8": 2, "10.1.0.0/16": 3, "10.1.2.0/24": 4, "10.1.2.3/32": 5}
        for order in (prefixes, reversed(prefixes)):
            table = PrefixTable()
            for prefix in order:
                insert(table, prefix, prefixes[prefix])
            found = [
                table.lookup(packed(a)) for a in ("10.1.2.3", "10.1.2.4", "10.1.3.0", "10.2.0.0", "9.9.9.9")
            ]
            assert found == [5, 4, 3, 2, 1]

    def test_the_longest_ipv6_prefix_wins_on_both_sides_of_64_bits(self) -> None:
        table = PrefixTable()
        for prefix, slot in {
            "::/0": 1,
            "fd00::/63": 2,
            "fd00::/64": 3,
            "fd00::/65": 4,
            "fd00::1/128": 5,
        }.items():
            insert(table, prefix, slot)
        addresses = ("fd00::1", "fd00::2", "fd00::8000:0:0:0", "fd00:0:0:1::", "fe80::1")
        assert [table.lookup(packed(address)) for address in addresses] == [5, 4, 3, 2, 1]

    def test_a_prefix_ends_where_it_ends(self) -> None:
        table = PrefixTable()
        insert(table, "10.1.2.0/24", 7)
        assert table.lookup(packed("10.1.1.255")) is None
        assert table.lookup(packed("10.1.2.0")) == 7
        assert table.lookup(packed("10.1.2.255")) == 7
        assert table.lookup(packed("10.1.3.0")) is None

    def test_families_do_not_meet(self) -> None:
        table = PrefixTable()
        insert(table, "0.0.0.0/0", 4)
        assert table.lookup(packed("::")) is None
        insert(table, "::/0", 6)
        assert table.lookup(packed("::ffff:10.0.0.1")) == 6
        assert table.lookup(packed("10.0.0.1")) == 4
        assert len(table) == 2

    def test_the_local_slot_is_found_like_any_other(self) -> None:
        table = PrefixTable()
        insert(table, "10.1.0.0/24", LOCAL_SLOT)
        assert table.lookup(packed("10.1.0.1")) == LOCAL_SLOT

    def test_inserting_again_repoints(self) -> None:
        table = PrefixTable()
        insert(table, "10.1.0.0/24", 1)
        insert(table, "10.1.0.0/24", 2)
        assert table.lookup(packed("10.1.0.1")) == 2
        assert len(table) == 1

    def test_removing_uncovers_what_is_shorter(self) -> None:
        table = PrefixTable()
        insert(table, "10.0.0.0/8", 1)
        insert(table, "10.1.0.0/16", 2)
        remove(table, "10.1.0.0/16")
        assert table.lookup(packed("10.1.0.1")) == 1
        remove(table, "10.0.0.0/8")
        assert table.lookup(packed("10.1.0.1")) is None
        assert len(table) == 0

    @pytest.mark.parametrize("absent", ["10.1.0.0/16", "10.0.0.0/9", "11.0.0.0/8", "fd00::/8"])
    def test_removing_what_is_not_there(self, absent: str) -> None:
        table = PrefixTable()
        insert(table, "10.0.0.0/8", 1)
        with pytest.raises(KeyError):
            remove(table, absent)
        assert len(table) == 1

    @pytest.mark.parametrize(
        ("address", "length"),
        [
            pytest.param(packed("10.0.0.0"), 33, id="IPv4 length 33"),
            pytest.param(packed("10.0.0.0"), -1, id="length -1"),
            pytest.param(packed("fd00::"), 129, id="IPv6 length 129"),
            pytest.param(packed("10.0.0.1"), 31, id="a host bit, IPv4"),
            pytest.param(packed("0.0.0.1"), 0, id="a host bit, length 0"),
            pytest.param(packed("fd00::1"), 127, id="a host bit, IPv6"),
            pytest.param(packed("fd00:0:0:1::"), 63, id="a host bit in the upper half"),
            pytest.param(b"", 0, id="no address"),
            pytest.param(bytes(5), 0, id="five bytes"),
        ],
    )
    def test_bad_prefixes_are_refused_and_change_nothing(self, address: bytes, length: int) -> None:
        table = PrefixTable()
        with pytest.raises(ValueError, match=r"length|address"):
            table.insert(address, length, 1)
        assert len(table) == 0

    @pytest.mark.parametrize("slot", [-1, MAX_PEERS])
    def test_bad_slots_are_refused(self, slot: int) -> None:
        with pytest.raises(ValueError, match="slot"):
            PrefixTable().insert(packed("10.0.0.0"), 8, slot)

    @pytest.mark.parametrize("address", [b"", bytes(3), bytes(5), bytes(15), bytes(17)])
    def test_lookup_of_what_is_no_address(self, address: bytes) -> None:
        with pytest.raises(ValueError, match="address"):
            PrefixTable().lookup(address)

    def test_every_length_at_once(self) -> None:
        for address in (packed("255.255.255.255"), packed("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")):
            table, bits = PrefixTable(), len(address) * 8
            for length in range(bits + 1):
                ones = (1 << bits) - (1 << (bits - length))
                table.insert(ones.to_bytes(len(address), "big"), length, length + 1)
            assert len(table) == bits + 1
            for length in range(bits + 1):
                near = ~(1 << (bits - 1 - length)) if length < bits else -1  # `length` ones and a zero
                probe = (((1 << bits) - 1) & near).to_bytes(len(address), "big")
                assert table.lookup(probe) == length + 1

    def test_ten_thousand_prefixes_come_and_go(self) -> None:
        table = PrefixTable()
        networks = [(10 << 24 | index << 8).to_bytes(4, "big") for index in range(10_000)]
        for slot, network in enumerate(networks):
            table.insert(network, 24, slot)
        assert len(table) == 10_000
        assert all(table.lookup(network[:3] + b"\7") == slot for slot, network in enumerate(networks))
        for network in networks[::2]:
            table.remove(network, 24)
        assert len(table) == 5_000
        for slot, network in enumerate(networks):
            assert table.lookup(network) == (None if slot % 2 == 0 else slot)


def peers_with(*slots: int) -> PeerTable:
    table = PeerTable()
    for slot in slots:
        fill(table, slot)
    return table


def fill(table: PeerTable, slot: int, **changes: object) -> None:
    fields: dict[str, object] = {
        "encapsulation": "geneve",
        "vni": 71,
        "router_mac": ROUTER_MAC,
        "endpoint": packed("192.0.2.1"),
        "port": 6081,
        "mtu": 1450,
    }
    table.set(slot, **(fields | changes))  # type: ignore[arg-type]


class TestPeerTable:
    @pytest.mark.parametrize("slot", [1, 2, 4_000, MAX_PEERS - 1])
    def test_a_filled_slot_counts_from_zero(self, slot: int) -> None:
        assert peers_with(slot).counters(slot) == {
            "encap_packets": 0,
            "encap_bytes": 0,
            "decap_packets": 0,
            "decap_bytes": 0,
        }

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("encapsulation", "gre"),
            ("encapsulation", ""),
            ("vni", -1),
            ("vni", 1 << 24),
            ("router_mac", b"\0" * 5),
            ("router_mac", b"\0" * 7),
            ("endpoint", b"\0" * 5),
            ("endpoint", b""),
            ("port", 0),
            ("port", -1),
            ("port", 65_536),
            ("mtu", 0),
            ("mtu", -1),
            ("mtu", 65_536),
        ],
    )
    def test_a_bad_field_is_refused_by_name_and_changes_nothing(self, name: str, value: object) -> None:
        table = PeerTable()
        with pytest.raises(ValueError, match=name):
            fill(table, 1, **{name: value})
        with pytest.raises(KeyError):
            table.counters(1)

    @pytest.mark.parametrize("slot", [-1, LOCAL_SLOT, MAX_PEERS, 1 << 20])
    def test_a_bad_slot_is_refused(self, slot: int) -> None:
        with pytest.raises(ValueError, match="slot"):
            peers_with(slot)

    @pytest.mark.parametrize("slot", [-1, 0, 2, MAX_PEERS, 1 << 20])
    def test_slots_that_hold_no_peer(self, slot: int) -> None:
        table = peers_with(1)
        with pytest.raises(KeyError):
            table.counters(slot)
        with pytest.raises(KeyError):
            table.clear(slot)
        with pytest.raises(KeyError):
            table.allow_source(packed("192.0.2.1"), slot)

    @pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::"])
    def test_sources_lead_to_their_peer_and_only_exactly(self, address: str) -> None:
        table = peers_with(1, 2)
        table.allow_source(packed(address), 2)
        assert table.find_source(packed(address)) == 2
        near = bytearray(packed(address))
        near[-1] ^= 1
        assert table.find_source(bytes(near)) is None

    def test_a_source_has_one_owner(self) -> None:
        table = peers_with(1, 2)
        table.allow_source(packed("192.0.2.1"), 1)
        table.allow_source(packed("192.0.2.1"), 1)
        with pytest.raises(ValueError, match="address"):
            table.allow_source(packed("192.0.2.1"), 2)
        assert table.find_source(packed("192.0.2.1")) == 1

    def test_a_peer_may_have_many_sources(self) -> None:
        table = peers_with(1)
        addresses = [packed("192.0.2.1"), packed("192.0.2.2"), packed("2001:db8::1")]
        for address in addresses:
            table.allow_source(address, 1)
        assert [table.find_source(address) for address in addresses] == [1, 1, 1]

    def test_a_forgotten_source_may_be_anothers(self) -> None:
        table = peers_with(1, 2)
        table.allow_source(packed("192.0.2.1"), 1)
        table.forget_source(packed("192.0.2.1"))
        assert table.find_source(packed("192.0.2.1")) is None
        table.allow_source(packed("192.0.2.1"), 2)
        assert table.find_source(packed("192.0.2.1")) == 2

    def test_forgetting_a_source_that_is_not_there(self) -> None:
        with pytest.raises(KeyError):
            peers_with(1).forget_source(packed("192.0.2.1"))

    def test_clear_forgets_every_source_of_the_slot_and_no_other(self) -> None:
        table = peers_with(1, 2)
        mine = [bytes([192, 0, 2, host]) for host in range(100)] + [
            packed(f"2001:db8::{n}") for n in range(50)
        ]
        others = [bytes([198, 51, 100, host]) for host in range(100)]
        for address in mine:
            table.allow_source(address, 1)
        for address in others:
            table.allow_source(address, 2)
        table.clear(1)
        assert all(table.find_source(address) is None for address in mine)
        assert all(table.find_source(address) == 2 for address in others)
        with pytest.raises(KeyError):
            table.counters(1)

    def test_a_bad_source_address_is_refused(self) -> None:
        table = peers_with(1)
        for length in (0, 3, 5, 15, 17):
            with pytest.raises(ValueError, match="address"):
                table.allow_source(bytes(length), 1)
            with pytest.raises(ValueError, match="address"):
                table.find_source(bytes(length))
