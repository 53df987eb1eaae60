"""Labs of real namespaces, daemons and devices, gone after the test whatever happened in it: `make_lab`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from forwarder.demo.lab import Lab

MakeLab = Callable[..., Lab]

_numbers = itertools.count(1)


@pytest.fixture
def make_lab(tun: None) -> Iterator[MakeLab]:
    """Lab(...) with a name of its own and entered."""
    with ExitStack() as stack:

        def make(encapsulation: str = "geneve", underlay: str = "ipv4") -> Lab:
            name = f"lab-{os.getpid():x}-{next(_numbers)}"
            return stack.enter_context(Lab(name, encapsulation=encapsulation, underlay=underlay))

        yield make
