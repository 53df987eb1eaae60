"""Longest-prefix match by trying every length from the longest down."""

from __future__ import annotations


class PrefixDict:
    def __init__(self) -> None:
        self._slots: dict[tuple[int, int, int], int] = {}

    @staticmethod
    def _key(address: bytes, length: int) -> tuple[int, int, int]:
        bits = len(address) * 8
        return bits, length, int.from_bytes(address, "big") >> (bits - length)

    def insert(self, address: bytes, length: int, slot: int) -> None:
        self._slots[self._key(address, length)] = slot

    def remove(self, address: bytes, length: int) -> None:
        del self._slots[self._key(address, length)]

    def lookup(self, address: bytes) -> int | None:
        for length in range(len(address) * 8, -1, -1):
            slot = self._slots.get(self._key(address, length))
            if slot is not None:
                return slot
        return None

    def __len__(self) -> int:
        return len(self._slots)
