from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastpath.table import MAX_PEERS, PrefixTable
from tests.reference.table import PrefixDict

# Few distinct bytes: prefixes then nest, collide and are removed again, instead of missing each other.
ADDRESS = st.sampled_from([4, 16]).flatmap(
    lambda size: st.lists(st.sampled_from([0, 1, 0x80, 0xFF]), min_size=size, max_size=size).map(bytes)
)
SLOT = st.integers(0, MAX_PEERS - 1)


def prefix_of(address: bytes, length: int) -> bytes:
    bits = len(address) * 8
    value = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
    return value.to_bytes(len(address), "big")


@st.composite
def prefixes(draw: st.DrawFn) -> tuple[bytes, int]:
    address = draw(ADDRESS)
    length = draw(st.integers(0, len(address) * 8) | st.sampled_from([0, 24, 32]))
    return prefix_of(address, length), length


class PrefixTableMachine(RuleBasedStateMachine):
    """The table and the dict oracle go through the same changes and answer the same."""

    @initialize()
    def start(self) -> None:
        self.table, self.oracle = PrefixTable(), PrefixDict()
        self.known: list[tuple[bytes, int]] = []

    @rule(prefix=prefixes(), slot=SLOT)
    def insert(self, prefix: tuple[bytes, int], slot: int) -> None:
        self.table.insert(*prefix, slot)
        self.oracle.insert(*prefix, slot)
        self.known.append(prefix)

    @rule(address=ADDRESS, slot=SLOT)
    def insert_a_crowd(self, address: bytes, slot: int) -> None:
        # Enough of one length that its level grows, and that entries displace each other.
        for low in range(20):
            prefix = address[:-1] + bytes([low]), len(address) * 8
            self.table.insert(*prefix, slot)
            self.oracle.insert(*prefix, slot)
            self.known.append(prefix)

    @rule(data=st.data())
    def remove_known(self, data: st.DataObject) -> None:
        if self.known:
            prefix = data.draw(st.sampled_from(self.known))
            self.known = [other for other in self.known if other != prefix]
            self.table.remove(*prefix)
            self.oracle.remove(*prefix)

    @rule(prefix=prefixes())
    def remove_any(self, prefix: tuple[bytes, int]) -> None:
        assert self._removes(self.table, prefix) == self._removes(self.oracle, prefix)
        self.known = [other for other in self.known if other != prefix]

    @staticmethod
    def _removes(table: Any, prefix: tuple[bytes, int]) -> bool:
        try:
            table.remove(*prefix)
        except KeyError:
            return False
        return True

    @rule(address=ADDRESS)
    def lookup(self, address: bytes) -> None:
        assert self.table.lookup(address) == self.oracle.lookup(address)

    @invariant()
    def every_known_prefix_is_found(self) -> None:
        if hasattr(self, "table"):
            assert len(self.table) == len(self.oracle)
            for address, _ in self.known[-40:]:
                assert self.table.lookup(address) == self.oracle.lookup(address)


TestPrefixTable = PrefixTableMachine.TestCase
TestPrefixTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
