"""Which address is next: ranges and the first gap in them. Pure.

Ranges are never enumerated, so an IPv6 /64 costs what an IPv4 /24 does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Pool:
    """Addresses low..high, both included, of one family, less the gateway and `excluded` (first, last)."""

    low: IpAddress
    high: IpAddress
    gateway: IpAddress
    excluded: tuple[tuple[IpAddress, IpAddress], ...] = ()

    @classmethod
    def of_prefix(cls, prefix: IpNetwork, gateway: IpAddress) -> Pool:
        """The prefix without its network address (IPv6: subnet-router anycast) and its IPv4 broadcast."""
        first, last = prefix.network_address, prefix.broadcast_address
        return cls(first + 1, last - 1 if prefix.version == 4 else last, gateway)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"

    def may_give(self, address: IpAddress) -> bool:
        return (
            address.version == self.low.version
            and int(self.low) <= int(address) <= int(self.high)
            and self.barred_until(int(address)) is None
        )

    def barred_until(self, number: int) -> int | None:
        """The end of the stretch of never given addresses that `number` lies in, if it does."""
        for first, last in ((self.gateway, self.gateway), *self.excluded):
            if first.version == self.low.version and int(first) <= number <= int(last):
                return int(last)
        return None


RangeSet = tuple[Pool, ...]
"""An attachment gets one address of each range set, from the first of its pools that has one left."""


def first_gap(low: int, high: int, taken: Iterable[int]) -> int | None:
    """The smallest number in low..high that is not in `taken`, which ascends and lies within low..high."""
    candidate = low
    for number in taken:
        if number > candidate:
            break
        candidate = number + 1
    return candidate if candidate <= high else None


def choose(
    pool: Pool, last: IpAddress | None, taken_within: Callable[[int, int], Iterable[int]]
) -> IpAddress | None:
    """The first free address after `last`, going round: one just given back is the last to be reused.

    `taken_within(low, high)` gives the taken numbers in that range ascending; it is read as far as needed.
    """
    low, high = int(pool.low), int(pool.high)
    start = low if last is None or not low <= int(last) < high else int(last) + 1
    for first, end in ((start, high), (low, start - 1)):
        while first <= end:
            number = first_gap(first, end, taken_within(first, end))
            if number is None:
                break
            barred = pool.barred_until(number)
            if barred is None:
                return type(pool.low)(number)
            first = barred + 1
    return None
