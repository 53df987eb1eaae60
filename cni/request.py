"""One CNI call: an environment and stdin, checked. Pure.

Source: containernetworking/cni SPEC.md 1.1.0, "CNI operations" and "Error".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cni.result import VERSIONS, CniError, Code, Result, parse_result

STDIN_LIMIT = 512 << 10  # bytes; the largest honest input, a GC for a thousand pods, is about 100 KB

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_IFNAME_MAX = 15  # IFNAMSIZ less the closing NUL, linux/if.h


class _Verb(NamedTuple):
    """What a verb needs from its caller."""

    variables: tuple[str, ...]  # besides CNI_COMMAND
    since: str  # the first of our VERSIONS that has it


_VERBS = {
    "ADD": _Verb(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"), since="0.3.0"),
    "DEL": _Verb(("CNI_CONTAINERID", "CNI_IFNAME"), since="0.3.0"),
    "CHECK": _Verb(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"), since="0.4.0"),
    "GC": _Verb(("CNI_PATH",), since="1.1.0"),
    "STATUS": _Verb((), since="1.1.0"),
    "VERSION": _Verb((), since="0.3.0"),
}

# Later the first; the tag spec-v1.1.0 has the other, and libcni sends both.
_VALID_ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")

# The keys of the configuration that we read, and what each must be. Others belong to somebody else.
_CONFIG_KEYS: Mapping[str, type] = {
    "cniVersion": str,
    "name": str,
    "type": str,
    "controlSocket": str,
    "stateDir": str,
    "dns": dict,
    "ipam": dict,
    "prevResult": dict,
}


@dataclass(frozen=True)
class Attachment:
    """The key of everything we keep: one interface of one container on one network."""

    network: str
    container: str
    ifname: str


@dataclass(frozen=True)
class Request:
    """A call that is well formed. Fields a verb does not have are empty."""

    command: str
    version: str
    network: str = ""
    container: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] | None = None  # CNI_ARGS
    netns_override: bool = False
    config: Mapping[str, Any] | None = None
    previous: Result | None = None
    path: tuple[str, ...] = ()  # CNI_PATH: where delegated plugins are
    valid: frozenset[tuple[str, str]] = frozenset()  # GC: (container, ifname) of what is to stay
    env: Mapping[str, str] | None = None  # the caller's, for delegated plugins

    @property
    def attachment(self) -> Attachment:
        return Attachment(self.network, self.container, self.ifname)


def parse(env: Mapping[str, str], stdin: bytes) -> Request:
    """The request, or CniError with the spec's code. Reads only CNI_* variables."""
    command = _command(env)
    config = _config(stdin, needed=command != "VERSION")
    version = config.get("cniVersion", "")
    if command == "VERSION":
        return Request(command, version)
    _check_version(command, version)
    try:
        return _checked(command, env, config, version)
    except CniError as error:
        error.version = version
        raise


def _checked(command: str, env: Mapping[str, str], config: Mapping[str, Any], version: str) -> Request:
    # DEL, GC and STATUS have no use for it: what is wrong in it must not stop them.
    previous = config.get("prevResult") if command in ("ADD", "CHECK") else None
    return Request(
        command=command,
        version=version,
        network=_network(config),
        container=_container(env),
        netns=env.get("CNI_NETNS", ""),
        ifname=_ifname(env),
        args=_args(env.get("CNI_ARGS", "")),
        netns_override=env.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true"),
        config=config,
        previous=parse_result(previous) if previous else None,
        path=tuple(filter(None, env.get("CNI_PATH", "").split(":"))),
        valid=_valid_attachments(config) if command == "GC" else frozenset(),
        env=env,
    )


def _command(env: Mapping[str, str]) -> str:
    command = env.get("CNI_COMMAND", "")
    if command and command not in _VERBS:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND is {command!r}; known are {', '.join(_VERBS)}")
    wanted = ("CNI_COMMAND", *(_VERBS[command].variables if command else ()))
    missing = [name for name in wanted if not env.get(name)]
    if missing:
        raise CniError(Code.INVALID_ENVIRONMENT, f"missing in the environment: {', '.join(missing)}")
    return command


def _config(stdin: bytes, *, needed: bool) -> dict[str, Any]:
    """The network configuration; an empty one only where none is needed."""
    if not needed and not stdin.strip():
        return {}
    if len(stdin) > STDIN_LIMIT:
        raise CniError(Code.DECODE_FAILURE, f"the network configuration on stdin is over {STDIN_LIMIT} bytes")
    try:
        config = json.loads(stdin.decode())
    except (ValueError, RecursionError) as error:
        raise CniError(
            Code.DECODE_FAILURE, "the network configuration on stdin is not JSON", str(error)
        ) from None
    if not isinstance(config, dict):
        raise CniError(
            Code.DECODE_FAILURE,
            f"the network configuration on stdin is {_shown(config)}, not an object",
        )
    for key, kind in _CONFIG_KEYS.items():
        if config.get(key) is None:
            config.pop(key, None)
        elif not isinstance(config[key], kind):
            wanted = "an object" if kind is dict else "a string"
            raise CniError(
                Code.INVALID_CONFIG,
                f"{key} in the configuration is {_shown(config[key])}, not {wanted}",
            )
    return config


def _check_version(command: str, version: str) -> None:
    if version not in VERSIONS:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {_shown(version)} is not supported; supported are {', '.join(VERSIONS)}",
        )
    since = _VERBS[command].since
    if VERSIONS.index(version) < VERSIONS.index(since):
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"{command} came with CNI {since}; the configuration says cniVersion {version}",
            version=version,
        )


def _valid_attachments(config: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """What either spelling of the key lists; null is Go's empty list, but no key at all is an error."""
    given = [key for key in _VALID_ATTACHMENTS if key in config]
    if not given:
        raise CniError(
            Code.INVALID_CONFIG, f"{_VALID_ATTACHMENTS[0]} is missing: GC does not know what is to stay"
        )
    valid = set()
    for key in given:
        items = [] if config[key] is None else config[key]
        if not isinstance(items, list):
            raise CniError(Code.INVALID_CONFIG, f"{key} is {_shown(items)}, not a list")
        for item in items:
            container, ifname = (
                (item.get("containerID"), item.get("ifname")) if isinstance(item, dict) else (None, None)
            )
            if not (isinstance(container, str) and isinstance(ifname, str) and container and ifname):
                raise CniError(
                    Code.INVALID_CONFIG, f"{key} has {_shown(item)}, not a containerID and an ifname"
                )
            valid.add((container, ifname))
    return frozenset(valid)


def _network(config: Mapping[str, Any]) -> str:
    name: str = config.get("name", "")
    if not name:
        raise CniError(Code.INVALID_CONFIG, "name is missing in the network configuration")
    if not _NAME.fullmatch(name):
        raise CniError(Code.INVALID_CONFIG, f"name is {_shown(name)}; it must match {_NAME.pattern}")
    return name


def _container(env: Mapping[str, str]) -> str:
    container = env.get("CNI_CONTAINERID", "")
    if container and not _NAME.fullmatch(container):
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID is {_shown(container)}; it must match {_NAME.pattern}"
        )
    return container


def _ifname(env: Mapping[str, str]) -> str:
    """The kernel's own rule (dev_valid_name) plus what the spec forbids."""
    ifname = env.get("CNI_IFNAME", "")
    size = len(ifname.encode(errors="surrogatepass"))
    forbidden = any(char in "/:" or char.isspace() or not char.isprintable() for char in ifname)
    if size > _IFNAME_MAX or ifname in (".", "..") or forbidden:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_IFNAME is {_shown(ifname)}; allowed are 1 to {_IFNAME_MAX} bytes, "
            "without '/', ':' and whitespace, not '.' or '..'",
        )
    return ifname


def _args(text: str) -> Mapping[str, str]:
    """CNI_ARGS, `KEY=VALUE;KEY=VALUE`. Keys we do not know are other plugins' business."""
    args = {}
    for pair in text.split(";"):
        key, equals, value = pair.partition("=")
        if pair and not (key and equals):
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                f"CNI_ARGS has {_shown(pair)}; allowed are KEY=VALUE, joined by ';'",
            )
        if pair:
            args[key] = value
    return args


def _shown(value: object) -> str:
    """`value` quoted for a message, never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
