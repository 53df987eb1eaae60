from __future__ import annotations

import random

from forwarder.discovery.backoff import Backoff


def test_waits_double_up_to_the_most_and_are_drawn_from_their_upper_half() -> None:
    backoff = Backoff(0.2, 3.0, random.Random(71))
    for ceiling in (0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0):
        assert ceiling / 2 <= backoff.next() <= ceiling


def test_success_begins_anew() -> None:
    backoff = Backoff(0.2, 3.0, random.Random(71))
    for _ in range(5):
        backoff.next()
    backoff.reset()
    assert backoff.next() <= 0.2


def test_nodes_that_lost_the_same_server_do_not_come_back_in_step() -> None:
    waits = {round(Backoff(0.2, 3.0, random.Random(seed)).next(), 6) for seed in range(100)}
    assert len(waits) > 90
