"""What is wrong with something an operator wrote, in a form that names it. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

MISSING: Final = object()
_MAX_VALUE_CHARACTERS = 80


class Fault(NamedTuple):
    """One refused value: its key (empty if it is the text as a whole), what stood there (MISSING if
    nothing), and what is allowed."""

    key: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        if not self.key:
            return self.allowed
        if self.value is MISSING:
            return f"{self.key} is missing: {self.allowed}"
        text = json.dumps(self.value, default=str, ensure_ascii=False)
        if len(text) > _MAX_VALUE_CHARACTERS:
            text = text[: _MAX_VALUE_CHARACTERS - 1] + "…"
        return f"{self.key} = {text}: {self.allowed}"


class ConfigError(ValueError):
    """Every fault of one text, none left out."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))
