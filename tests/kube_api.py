"""A Kubernetes API server that knows only Nodes: list, watch with bookmarks and forgetting, patch of status.

In a test's own process it is driven by its methods. As a program (`python -m tests.kube_api HOST PORT FILE`)
it begins with the Nodes of a JSON file, and keeps the file as the Nodes are.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

Node = dict[str, Any]


def node(
    name: str, *pod_cidrs: str, annotations: dict[str, str] | None = None, unavailable: bool = False
) -> Node:
    conditions = [{"type": "NetworkUnavailable", "status": "True"}] if unavailable else []
    return {
        "metadata": {"name": name, "annotations": dict(annotations or {})},
        "spec": {"podCIDRs": list(pod_cidrs)} if pod_cidrs else {},
        "status": {"conditions": [{"type": "Ready", "status": "False"}, *conditions]},
    }


class KubeApi:
    """`nodes` by name. `requests` holds (verb, path, query) of all that was asked."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.token = ""
        self.refuse_patches = False
        self.silent = False
        self.nonsense: str | None = None
        self.url = ""
        self._version = 100
        self._oldest = 0
        self._events: list[tuple[int, str, Node]] = []
        self._changed = asyncio.Condition()
        self._watches: set[web.StreamResponse] = set()
        self._runner: web.AppRunner | None = None
        self._file: Path | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/api/v1/nodes", self._list)
        app.router.add_get("/api/v1/nodes/{name}", self._get)
        app.router.add_patch("/api/v1/nodes/{name}/status", self._patch)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        if self._runner is not None:
            for watch in self._watches:
                watch.force_close()
            await self._runner.cleanup()
            self._runner = None

    def kubeconfig(self, path: Path, **user: Any) -> Path:
        table = {
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": user}],
        }
        path.write_text(json.dumps(table))
        return path

    async def put(self, changed: Node) -> None:
        name = changed["metadata"]["name"]
        await self._record("MODIFIED" if name in self.nodes else "ADDED", changed)

    async def delete(self, name: str) -> None:
        await self._record("DELETED", self.nodes[name])

    async def forget(self) -> None:
        """All events so far, as etcd does when it is compacted."""
        async with self._changed:
            self._version += 1
            self._oldest = self._version
            self._events.clear()
            self._changed.notify_all()

    async def _record(self, kind: str, changed: Node) -> None:
        async with self._changed:
            self._version += 1
            stored = copy.deepcopy(changed)
            stored["metadata"]["resourceVersion"] = str(self._version)
            if kind == "DELETED":
                del self.nodes[stored["metadata"]["name"]]
            else:
                self.nodes[stored["metadata"]["name"]] = stored
            self._events.append((self._version, kind, stored))
            self._changed.notify_all()
        self._save()

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query)))
        if self.silent:
            await asyncio.sleep(3600)
        if self.nonsense is not None:
            return web.Response(text=self.nonsense)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        found: web.StreamResponse = await handler(request)
        return found

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") == "true":
            return await self._watch(request)
        names = sorted(self.nodes)
        start = int(request.query.get("continue", "0"))
        end = start + int(request.query.get("limit", "500"))
        metadata = {"resourceVersion": str(self._version)}
        if end < len(names):
            metadata["continue"] = str(end)
        return web.json_response(
            {"items": [self.nodes[name] for name in names[start:end]], "metadata": metadata}
        )

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version, seconds = int(request.query["resourceVersion"]), float(request.query["timeoutSeconds"])
        response = web.StreamResponse()
        await response.prepare(request)
        self._watches.add(response)
        try:
            async with asyncio.timeout(seconds):
                while True:
                    if version < self._oldest:
                        gone = {"code": 410, "message": f"too old resource version: {version}"}
                        await response.write(_line("ERROR", gone))
                        return response
                    for at, kind, changed in list(self._events):
                        if at > version:
                            version = at
                            await response.write(_line(kind, changed))
                    async with self._changed:
                        if self._version == version:
                            await self._changed.wait()
        except TimeoutError:
            bookmark = {"kind": "Node", "metadata": {"resourceVersion": str(self._version)}}
            await response.write(_line("BOOKMARK", bookmark))
        finally:
            self._watches.discard(response)
        return response

    async def _get(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.nodes:
            return _status(404, f'nodes "{name}" not found')
        return web.json_response(self.nodes[name])

    async def _patch(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.refuse_patches:
            return _status(403, f'nodes "{name}" is forbidden')
        if request.content_type != "application/strategic-merge-patch+json":
            return _status(415, "the body is of the wrong type")
        patch = await request.json()
        changed = copy.deepcopy(self.nodes[name])
        changed["metadata"]["annotations"].update(patch.get("metadata", {}).get("annotations", {}))
        merged = {item["type"]: item for item in changed["status"]["conditions"]}
        merged |= {item["type"]: item for item in patch.get("status", {}).get("conditions", [])}
        changed["status"]["conditions"] = list(merged.values())
        await self._record("MODIFIED", changed)
        return web.json_response(self.nodes[name])

    def _save(self) -> None:
        if self._file is not None:
            self._file.with_suffix(".new").write_text(json.dumps(self.nodes))
            self._file.with_suffix(".new").replace(self._file)

    async def serve(self, host: str, port: int, file: Path, nodes: dict[str, Node]) -> None:
        for initial in nodes.values():
            await self.put(initial)
        self._file = file
        self._save()
        await self.start(host, port)
        print("serving", flush=True)  # noqa: T201
        await asyncio.Event().wait()


def _line(kind: str, value: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


if __name__ == "__main__":
    kept = Path(sys.argv[3])
    asyncio.run(KubeApi().serve(sys.argv[1], int(sys.argv[2]), kept, json.loads(kept.read_text())))
