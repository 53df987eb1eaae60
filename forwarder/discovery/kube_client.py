"""As much of the Kubernetes API as we need: get a Node, list, watch, and patch a Node's status.

A plain HTTP client: the official one brings every type of the API, threads for watches and some thirty
packages, of which five requests need nothing.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from base64 import b64decode
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

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
    tls_context,
)
from forwarder.faults import ConfigError, Fault

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
NODES: Final = "/api/v1/nodes"
PAGE: Final = 500
ABSENT: Final = 404
GONE: Final = 410
STRATEGIC_MERGE: Final = "application/strategic-merge-patch+json"

KUBECONFIG: Final = "discovery.kubeconfig"


class KubeError(RuntimeError):
    """The API server could not be asked or refused; the text says why."""


class AbsentError(KubeError):
    """There is nothing of that name, or the server is of another version."""


class GoneError(RuntimeError):
    """What happened since the version asked for is forgotten: list everything again."""


@dataclass(frozen=True, slots=True)
class Access:
    """Where the API server is and who we are there. A token is read anew from its file: it changes."""

    url: str
    tls: ssl.SSLContext | None = None
    token: str = ""
    token_file: Path | None = None

    def headers(self) -> dict[str, str]:
        token = self.token_file.read_text().strip() if self.token_file is not None else self.token
        return {"Authorization": f"Bearer {token}"} if token else {}


class KubeClient:
    """Every request has a deadline. Close it."""

    def __init__(self, access: Access) -> None:
        self._access = access
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

    async def node(self, name: str) -> dict[str, Any]:
        """A Node object."""
        answer = await self._ask("GET", f"{NODES}/{quote(name, safe='')}", deadlines(REQUEST_SECONDS))
        with sensible(KubeError, self._access.url):
            _check(answer)
        return answer

    async def objects(self, collection: str = NODES) -> tuple[list[dict[str, Any]], str]:
        """All objects of a collection, which is its path, and the version they are of."""
        found: list[dict[str, Any]] = []
        query = {"limit": str(PAGE)}
        while True:
            answer = await self._ask("GET", f"{collection}?{urlencode(query)}", deadlines(LIST_SECONDS))
            with sensible(KubeError, self._access.url):
                items, metadata = answer["items"] or [], answer["metadata"]
                for item in items:
                    _check(item)
                found += items
                if not metadata.get("continue"):
                    return found, str(metadata["resourceVersion"])
                query["continue"] = metadata["continue"]

    async def watch(
        self, version: str, seconds: int, collection: str = NODES
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """(ADDED, MODIFIED, DELETED or BOOKMARK; the object) after the version. The server ends it after so
        many seconds; one that does not is dead, which is a KubeError."""
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        path, limits = f"{collection}?{urlencode(query)}", deadlines(seconds + REQUEST_SECONDS)
        try:
            async with (
                await self._request("GET", path, limits) as response,
                aclosing(read_lines(response)) as lines,
            ):
                async for line in lines:
                    with sensible(KubeError, self._access.url):
                        kind, changed = line["type"], line["object"]
                        if kind == "ERROR":
                            raise _error_of(changed)
                        _check(changed, named=kind != "BOOKMARK")
                    yield kind, changed
        except TimeoutError:
            raise KubeError(f"{self._access.url}: no answer in time") from None
        except (aiohttp.ClientError, OSError, HttpError) as error:
            raise KubeError(f"{self._access.url}: {str(error) or type(error).__name__}") from None

    async def patch_status(self, name: str, patch: Mapping[str, Any]) -> None:
        """Merge into a Node; its metadata and status can be changed so, and nothing else."""
        path = f"{NODES}/{quote(name, safe='')}/status"
        await self._ask("PATCH", path, deadlines(REQUEST_SECONDS), dict(patch))

    async def _ask(
        self, verb: str, path: str, limits: aiohttp.ClientTimeout, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            async with await self._request(verb, path, limits, body) as response:
                return await decode(await read_body(response))
        except (aiohttp.ClientError, TimeoutError, OSError, HttpError) as error:
            reason = str(error) or "no answer in time"
            raise KubeError(f"{self._access.url}: {reason}") from None

    async def _request(
        self, verb: str, path: str, limits: aiohttp.ClientTimeout, body: dict[str, Any] | None = None
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = open_session(self._access.tls)
        headers = self._access.headers()
        if body is not None:
            headers["Content-Type"] = STRATEGIC_MERGE
        response = await self._session.request(
            verb, self._access.url + path, json=body, timeout=limits, headers=headers
        )
        if response.status == 200:
            return response
        async with response:
            text = await read_body(response)
        try:
            status = await decode(text)
        except HttpError:
            status = {"message": f"status {response.status}"}
        raise _error_of({"code": response.status, **status})


def _check(item: Any, *, named: bool = True) -> None:
    """TypeError or KeyError unless it is an object of the API, as far as all are alike."""
    metadata = item["metadata"]
    if not isinstance(metadata["name"] if named else "", str):
        raise TypeError("metadata.name is no string")
    if not isinstance(metadata.get("annotations") or {}, dict) or not isinstance(
        item.get("spec") or {}, dict
    ):
        raise TypeError("metadata.annotations or spec is no object")


def _error_of(status: Mapping[str, Any]) -> Exception:
    text = str(status.get("message") or f"status {status.get('code')}")
    kinds: dict[Any, type[Exception]] = {ABSENT: AbsentError, GONE: GoneError}
    return kinds.get(status.get("code"), KubeError)(text)


def access_by(kubeconfig: Path | None) -> Access:
    """By a kubeconfig, or the service account. ConfigError if it cannot be used."""
    return in_cluster() if kubeconfig is None else from_kubeconfig(kubeconfig)


def in_cluster(environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> Access:
    """By the service account of the pod we run in. ConfigError if this is no pod."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (account / "token").exists():
        allowed = "must be a kubeconfig file: this process does not run in a pod with a service account"
        raise ConfigError([Fault(KUBECONFIG, "", allowed)])
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    tls = tls_context(account / "ca.crt", None, None)
    return Access(url, tls, token_file=account / "token")


def from_kubeconfig(path: Path) -> Access:
    """By a kubeconfig's current context. ConfigError with what it lacks."""
    import yaml  # only here is YAML ever read

    def refuse(reason: str) -> ConfigError:
        return ConfigError([Fault(KUBECONFIG, str(path), reason)])

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = table["current-context"]
        context = _named(table["contexts"], name)["context"]
        cluster = _named(table["clusters"], context["cluster"])["cluster"]
        user = _named(table["users"], context["user"])["user"] or {}
        if "exec" in user or "auth-provider" in user:
            raise refuse(
                "names a program to log in with, which podloom does not run: use a token or certificate"
            )
        url = str(cluster["server"]).rstrip("/")
        tls = _tls(cluster, user, path.parent) if url.startswith("https:") else None
        token_file = path.parent / user["tokenFile"] if "tokenFile" in user else None
        return Access(url, tls, str(user.get("token", "")), token_file)
    except (OSError, ValueError, yaml.YAMLError, ssl.SSLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise refuse(f"cannot be used: {error}") from None
    except (KeyError, TypeError, StopIteration, AttributeError) as error:
        raise refuse(f"is no kubeconfig with a current context: it lacks {error}") from None


def _named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def _tls(cluster: Mapping[str, Any], user: Mapping[str, Any], base: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if "certificate-authority-data" in cluster:
        context.load_verify_locations(cadata=b64decode(cluster["certificate-authority-data"]).decode())
    elif "certificate-authority" in cluster:
        context.load_verify_locations(cafile=base / cluster["certificate-authority"])
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with ExitStack() as stack:
        files = [_file(user, key, base, stack) for key in ("client-certificate", "client-key")]
        if all(files):
            context.load_cert_chain(*files)  # type: ignore[arg-type]
    return context


def _file(user: Mapping[str, Any], key: str, base: Path, stack: ExitStack) -> Path | None:
    """A file that holds what the kubeconfig holds: the ssl module reads no key from memory."""
    if f"{key}-data" in user:
        file = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115 (mode 0600; the stack closes it)
        file.write(b64decode(user[f"{key}-data"]))
        file.flush()
        return Path(file.name)
    return base / user[key] if key in user else None
