"""etcd's v3 API, as its gRPC gateway offers it over plain HTTP: JSON, with keys and values in base64 and
64-bit numbers as strings (etcd documentation, "gRPC gateway")."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import aiohttp

from forwarder.discovery.http import (
    LIST_SECONDS,
    REQUEST_SECONDS,
    HttpError,
    deadlines,
    decode,
    open_session,
    read_body,
    read_lines,
    sensible,
)

UNAUTHENTICATED: Final = 16  # google.rpc.Code
PAGE: Final = 2000


class EtcdError(RuntimeError):
    """No member did what it was asked; the text says which was asked last and why it did not."""


class CompactedError(RuntimeError):
    """What happened since the revision asked for is forgotten: list everything again."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """`lease` is 0 if the key has none. A byte of the key that is not UTF-8 is a lone surrogate (PEP 383)."""

    key: str
    value: bytes
    created: int
    modified: int
    lease: int


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a watch: all changes up to `revision` have been said."""

    revision: int
    changes: tuple[KeyValue | Deleted, ...]


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A condition: the key was last modified at this revision; 0, there is none."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class NothingSince:
    """A condition: no key with this prefix was modified after the revision."""

    prefix: str
    revision: int


Condition: TypeAlias = Unchanged | NothingSince


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int


class EtcdClient:
    """Asks one member after the other until one answers. Every request has a deadline."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        username: str = "",
        password: str = "",
    ) -> None:
        self._urls = tuple(urls)
        self._tls = tls
        self._credentials = {"name": username, "password": password} if username else None
        self._token = ""
        self._at = 0
        self._session: aiohttp.ClientSession | None = None
        self._leaving: asyncio.Future[None] | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def reconnect(self) -> None:
        """Use other connections from now on: what those there are come from may be gone. What is under way on
        them fails, and can be asked again."""
        if self._session is not None:
            self._leaving = asyncio.ensure_future(self._session.close())
            self._session = None

    async def list(self, prefix: str) -> tuple[tuple[KeyValue, ...], int]:
        """All keys with this prefix, oldest creation first, and the revision they are of."""
        found: list[KeyValue] = []
        start, revision = _bytes(prefix), 0
        while True:
            answer = await self._ask(
                "kv/range",
                {
                    "key": _text(start),
                    "range_end": _text(_end(prefix)),
                    "limit": str(PAGE),
                    "revision": str(revision),
                },
                LIST_SECONDS,
            )
            with sensible(EtcdError, self._url()):
                revision = revision or int(answer["header"]["revision"])
                page = [_key_value(item) for item in answer.get("kvs", ())]
            found += page
            if not answer.get("more") or not page:
                return tuple(sorted(found, key=lambda item: item.created)), revision
            start = _bytes(page[-1].key) + b"\0"

    async def commit(self, conditions: Sequence[Condition], puts: Sequence[Put]) -> bool:
        """Make all changes if all conditions hold; whether they did."""
        answer = await self._ask(
            "kv/txn",
            {
                "compare": [_compare(condition) for condition in conditions],
                "success": [
                    {
                        "request_put": {
                            "key": _text(_bytes(put.key)),
                            "value": _text(put.value),
                            "lease": str(put.lease),
                        }
                    }
                    for put in puts
                ],
            },
        )
        return bool(answer.get("succeeded"))

    async def grant(self, seconds: int) -> int:
        """A new lease's id."""
        answer = await self._ask("lease/grant", {"TTL": str(seconds)})
        with sensible(EtcdError, self._url()):
            return int(answer["ID"])

    async def revoke(self, lease: int) -> None:
        """End a lease, and what has it."""
        await self._ask("lease/revoke", {"ID": str(lease)})

    async def keep_alive(self, lease: int) -> bool:
        """Whether the lease was still there to be renewed."""
        answer = await self._ask("lease/keepalive", {"ID": str(lease)})
        with sensible(EtcdError, self._url()):
            return int(answer["result"].get("TTL", 0)) > 0

    async def watch(
        self, prefix: str, revision: int, silence_seconds: float
    ) -> AsyncGenerator[Progress, None]:
        """What happens to the keys with this prefix from the revision on; first, that the watch stands. Ends
        after so long a silence, or else by CompactedError or EtcdError."""
        create = {
            "key": _text(_bytes(prefix)),
            "range_end": _text(_end(prefix)),
            "start_revision": str(revision),
            "progress_notify": True,
        }
        # Without a leader nothing changes that the member would know of: better another member.
        headers = {"Grpc-Metadata-hasleader": "true"}
        limits = deadlines(None, silence_seconds)
        url, heard = self._url(), False
        try:
            async with (
                await self._post(url, "watch", {"create_request": create}, limits, headers) as response,
                aclosing(read_lines(response)) as lines,
            ):
                async for line in lines:
                    with sensible(EtcdError, url):
                        progress = _progress(line, revision)
                    yield progress
                    heard = True
        except aiohttp.SocketTimeoutError:
            if not heard:
                self._turn_from(url)
                raise EtcdError(f"{url}: no answer in time") from None
        except (aiohttp.ClientError, TimeoutError, OSError, HttpError, _AnswerError) as error:
            self._turn_from(url)
            raise EtcdError(f"{url}: {_reason(error)}") from None

    async def _ask(self, what: str, body: dict[str, Any], seconds: float = REQUEST_SECONDS) -> dict[str, Any]:
        """One member's answer. A member that refuses is believed; one that does not answer is not."""
        reasons = []
        for _ in self._urls:
            url = self._url()
            try:
                async with await self._post(url, what, body, deadlines(seconds)) as response:
                    answer = await decode(await read_body(response))
                if "error" in answer:
                    raise _AnswerError(_message(answer), _code(answer))
                return answer
            except (aiohttp.ClientError, TimeoutError, OSError, HttpError, _AnswerError) as error:
                reasons.append(f"{url}: {_reason(error)}")
                self._turn_from(url)
        raise EtcdError("; ".join(reasons))

    async def _post(
        self,
        url: str,
        what: str,
        body: dict[str, Any],
        limits: aiohttp.ClientTimeout,
        headers: dict[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = open_session(self._tls)
        for attempt in (1, 2):
            if self._credentials is not None and not self._token:
                self._token = await self._authenticate(url, limits)
            sent = {**(headers or {}), **({"Authorization": self._token} if self._token else {})}
            response = await self._session.post(f"{url}/v3/{what}", json=body, timeout=limits, headers=sent)
            if response.status == 200:
                return response
            async with response:
                answer = await decode(await read_body(response))
            # A token lives some minutes, and not over a restart of the server.
            if _code(answer) != UNAUTHENTICATED or self._credentials is None or attempt == 2:
                raise _AnswerError(_message(answer), _code(answer))
            self._token = ""
        raise AssertionError("unreachable")

    async def _authenticate(self, url: str, limits: aiohttp.ClientTimeout) -> str:
        assert self._session is not None  # noqa: S101 (the caller opened it)
        async with self._session.post(
            f"{url}/v3/auth/authenticate", json=self._credentials, timeout=limits
        ) as response:
            answer = await decode(await read_body(response))
        if not isinstance(answer.get("token"), str):
            raise _AnswerError(_message(answer), _code(answer))
        return str(answer["token"])

    def _url(self) -> str:
        return self._urls[self._at % len(self._urls)]

    def _turn_from(self, url: str) -> None:
        if url == self._url():
            self._at += 1


class _AnswerError(RuntimeError):
    def __init__(self, text: str, code: int) -> None:
        self.code = code
        super().__init__(text)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return str(error.get("message") if isinstance(error, dict) else error or "an answer without sense")


def _code(answer: dict[str, Any]) -> int:
    error = answer.get("error")
    code = error.get("grpc_code") if isinstance(error, dict) else answer.get("code")
    return code if isinstance(code, int) else 0


def _progress(line: dict[str, Any], revision: int) -> Progress:
    if "error" in line:
        raise _AnswerError(_message(line), _code(line))
    result = line.get("result", {})
    if "compact_revision" in result:
        raise CompactedError(f"revision {revision} is compacted")
    if result.get("canceled"):
        raise _AnswerError(str(result.get("cancel_reason") or "the watch was cancelled"), 0)
    changes = tuple(_change(event) for event in result.get("events", ()))
    if not changes and result.get("created"):
        # The header is of now, and what happened between may still be on its way.
        return Progress(revision - 1, ())
    return Progress(int(result["header"]["revision"]), changes)


def _change(event: dict[str, Any]) -> KeyValue | Deleted:
    if event.get("type") == "DELETE":
        return Deleted(_key(event["kv"]))
    return _key_value(event["kv"])


def _key_value(item: dict[str, Any]) -> KeyValue:
    return KeyValue(
        key=_key(item),
        value=b64decode(item.get("value", "")),
        created=int(item["create_revision"]),
        modified=int(item["mod_revision"]),
        lease=int(item.get("lease", 0)),
    )


def _key(item: dict[str, Any]) -> str:
    return b64decode(item["key"]).decode("utf-8", "surrogateescape")


def _compare(condition: Condition) -> dict[str, Any]:
    if isinstance(condition, Unchanged):
        return {
            "key": _text(_bytes(condition.key)),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(condition.revision),
        }
    return {
        "key": _text(_bytes(condition.prefix)),
        "range_end": _text(_end(condition.prefix)),
        "target": "MOD",
        "result": "LESS",
        "mod_revision": str(condition.revision + 1),
    }


def _end(prefix: str) -> bytes:
    """The first key after all that begin so (none of our prefixes ends in 0xff)."""
    encoded = _bytes(prefix)
    return encoded[:-1] + bytes([encoded[-1] + 1])


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(value: bytes) -> str:
    return b64encode(value).decode()
