"""A clock for those who take one as an argument: hours of waiting in a moment."""

from __future__ import annotations

import asyncio


class VirtualTime:
    """`clock` stands still while anything is under way; when all sleep, it moves to whoever wakes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        sleeper = self.now + seconds, woken
        self._sleepers.append(sleeper)
        try:
            await woken
        finally:
            self._sleepers.remove(sleeper)

    async def go_on(self, seconds: float, sleepers: int) -> None:
        """Let so much time pass, in which so many sleep whenever nothing is under way."""
        end = self.now + seconds
        while True:
            async with asyncio.timeout(10):
                while len(self._asleep()) < sleepers:  # noqa: ASYNC110 (what is under way tells nobody)
                    await asyncio.sleep(0)
            wakes_at, woken = min(self._asleep(), key=lambda sleeper: sleeper[0])
            if wakes_at > end:
                self.now = end
                return
            self.now = wakes_at
            woken.set_result(None)

    def _asleep(self) -> list[tuple[float, asyncio.Future[None]]]:
        return [sleeper for sleeper in self._sleepers if not sleeper[1].done()]
