"""How a table of TOML becomes a dataclass: kinds of values, and faults for what is not one. Pure.

What stands in podloom's own file is not known here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from forwarder.faults import MISSING, Fault

T = TypeVar("T")


class RefusedError(ValueError):
    """A value that is not allowed: (where in it, the value there, what is allowed) of each wrong part."""

    def __init__(self, *parts: tuple[str, Any, str]) -> None:
        self.parts = parts
        super().__init__(parts)


class Kind(NamedTuple):
    """How a TOML value becomes ours, RefusedError if it cannot, and the sentence on what is allowed."""

    convert: Callable[[Any], Any]
    allowed: str


def kind_of(toml_type: type, allowed: str, convert: Callable[[Any], Any] = lambda value: value) -> Kind:
    """A value of one TOML type; `convert` raises ValueError, with a text where more can be said."""

    def checked(value: Any) -> Any:
        if type(value) is not toml_type:  # not isinstance: TOML's true is no integer
            raise RefusedError(("", value, allowed))
        try:
            return convert(value)
        except ValueError as error:
            raise RefusedError(("", value, str(error) or allowed)) from None

    return Kind(checked, allowed)


def integer(low: int, high: int, *, or_zero: bool = False) -> Kind:
    def convert(value: int) -> int:
        if not (low <= value <= high or (or_zero and value == 0)):
            raise ValueError
        return value

    return kind_of(int, f"must be {'0 or ' if or_zero else ''}an integer from {low} to {high}", convert)


def one_of(*allowed: str) -> Kind:
    def convert(value: str) -> str:
        if value not in allowed:
            raise ValueError
        return value

    return kind_of(str, "must be " + " or ".join(f'"{name}"' for name in allowed), convert)


def matching(pattern: str, allowed: str) -> Kind:
    def convert(value: str) -> str:
        if not re.fullmatch(pattern, value) or value in (".", ".."):
            raise ValueError
        return value

    return kind_of(str, allowed, convert)


def list_of(kind: Kind, allowed: str, *, at_least: int = 0, at_most: int | None = None) -> Kind:
    """A tuple of distinct values; each element's own fault names its index."""

    def convert(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) < at_least or len(value) > (at_most or len(value)):
            raise RefusedError(("", value, allowed))
        converted: list[Any] = []
        parts: list[tuple[str, Any, str]] = []
        for index, element in enumerate(value):
            try:
                item = kind.convert(element)
            except RefusedError as refused:
                parts += [(f"[{index}]{suffix}", wrong, text) for suffix, wrong, text in refused.parts]
                continue
            if item in converted:
                parts.append((f"[{index}]", element, "must not be listed twice"))
            converted.append(item)
        if parts:
            raise RefusedError(*parts)
        return tuple(converted)

    return Kind(convert, allowed)


def read_section(
    section: type[T], kinds: Mapping[str, Kind], table: Mapping[str, Any], path: str, faults: list[Fault]
) -> T | None:
    """The section with the table's values, the dataclass's own defaults for what is absent; None if any
    value was refused."""
    before = len(faults)
    refuse_unknown(table, kinds, f"{path}.", faults)
    values = {}
    for item in dataclasses.fields(cast(Any, section)):
        key = f"{path}.{item.name}"
        if item.name in table:
            try:
                values[item.name] = kinds[item.name].convert(table[item.name])
            except RefusedError as refused:
                faults += [Fault(key + suffix, value, allowed) for suffix, value, allowed in refused.parts]
        elif item.default is dataclasses.MISSING:
            faults.append(Fault(key, MISSING, kinds[item.name].allowed))
    return section(**values) if len(faults) == before else None


def refuse_unknown(
    table: Mapping[str, Any], known: Collection[str], prefix: str, faults: list[Fault]
) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"
            faults.append(Fault(prefix + key, table[key], f"is not a key podloom knows; {hint}"))
