"""Labs of real namespaces, daemons and devices for tests."""

from __future__ import annotations

import itertools
import os

from forwarder.demo.lab import Lab

_numbers = itertools.count(1)


def new_lab(
    encapsulation: str = "geneve", underlay: str = "ipv4", source: str = "static", extra_config: str = ""
) -> Lab:
    """A lab with a name of its own, to be used in a `with`: it is gone after that, whatever happened."""
    name = f"lab-{os.getpid():x}-{next(_numbers)}"
    return Lab(name, encapsulation=encapsulation, underlay=underlay, source=source, extra_config=extra_config)
