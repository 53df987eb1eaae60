"""Services followed at an API server that ends its watches, forgets, falls silent and refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from forwarder.discovery.kube_client import KubeClient, from_kubeconfig
from forwarder.names.kube_services import KubeServices
from forwarder.names.kubernetes import OLD_SLICES_PATH, SERVICES_PATH, SLICES_PATH
from forwarder.names.records import Change
from forwarder.names.zone import Zone
from tests.kube_api import KubeApi
from tests.unit.test_names_kubernetes import HEADLESS, READY, endpoint_slice, service
from tests.unit.test_names_zone import GATEWAYS

NAME = "db-0.db.shop.svc.cluster.local"


class ServiceApi:
    """Two collections on one address."""

    def __init__(self, slices_path: str = SLICES_PATH) -> None:
        self.slices_path = slices_path
        self.services, self.slices = KubeApi(), KubeApi()
        self.forbidden = False
        self.requests = 0
        self._asked = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        app = web.Application(middlewares=[self._check])
        app.router.add_get(SERVICES_PATH, self.services._list)
        app.router.add_get(self.slices_path, self.slices._list)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.services.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        for collection in (self.services, self.slices):
            for watch in collection._watches:
                watch.force_close()
        await self._runner.cleanup()

    async def asked(self, times: int) -> None:
        """Wait until so many more requests have come."""
        times += self.requests
        async with asyncio.timeout(10):
            while self.requests < times:
                self._asked.clear()
                await self._asked.wait()

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests += 1
        self._asked.set()
        if self.forbidden:
            return web.json_response({"code": 403, "message": "services is forbidden"}, status=403)
        found: web.StreamResponse = await handler(request)
        return found


class Names:
    """What the resolver would know."""

    def __init__(self) -> None:
        self.zone = Zone("cluster.local", GATEWAYS, (), ("kubernetes",))
        self.changes: list[Change] = []
        self._told = asyncio.Event()

    def tell(self, change: Change) -> None:
        self.changes.append(change)
        assert self.zone.apply("kubernetes", change) == []
        self._told.set()

    def found(self, name: str = NAME) -> list[str] | str:
        found = self.zone.look_up(name, "A")
        assert found is not None
        return [rr.value for rr in found.answer] or found.rcode

    async def until(self, expected: list[str] | str, name: str = NAME) -> None:
        async with asyncio.timeout(10):
            while self.found(name) != expected:
                self._told.clear()
                await self._told.wait()


def story(
    tmp_path: Path,
    tell: Callable[[ServiceApi, Names], Awaitable[None]],
    seconds: int = 30,
    slices_path: str = SLICES_PATH,
) -> None:
    @asynccontextmanager
    async def following(api: ServiceApi, names: Names) -> AsyncIterator[None]:
        client = KubeClient(from_kubeconfig(api.services.kubeconfig(tmp_path / "kubeconfig")))
        task = asyncio.create_task(KubeServices(client, names.tell, watch_seconds=seconds).follow())
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await client.close()

    async def run() -> None:
        api, names = ServiceApi(slices_path), Names()
        await api.services.put(HEADLESS)
        await api.slices.put(endpoint_slice("db-a", "db", READY))
        await api.start()
        try:
            assert names.found() == "SERVFAIL", "nothing was heard yet, so nobody knows"
            async with following(api, names):
                await names.until(["10.42.1.5"])
                await tell(api, names)
        finally:
            await api.stop()

    asyncio.run(run())


MOVED = endpoint_slice("db-a", "db", {**READY, "addresses": ["10.42.2.9"]})


def test_services_come_and_go(tmp_path: Path) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        await api.slices.put(MOVED)
        await names.until(["10.42.2.9"])
        await api.services.put(service("web", clusterIP="10.43.0.7"))
        await names.until(["10.43.0.7"], "web.shop.svc.cluster.local")
        await api.services.delete("db")
        await names.until("NXDOMAIN")
        assert len(names.changes) == 4

    story(tmp_path, tell)


def test_watches_that_end_go_on_where_they_were(tmp_path: Path) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        await api.asked(4)  # each watch has ended and begun again
        await api.slices.put(MOVED)
        await names.until(["10.42.2.9"])
        assert len(names.changes) == 2, "nothing was listed again"

    story(tmp_path, tell, seconds=1)


def test_a_server_of_another_version_is_understood_and_so_is_its_upgrade(tmp_path: Path) -> None:
    """Kubernetes 1.20 has EndpointSlices in v1beta1 only, 1.25 in v1 only."""

    async def tell(api: ServiceApi, names: Names) -> None:
        await api.slices.put(MOVED)
        await names.until(["10.42.2.9"])
        await api.stop()
        api.slices_path = SLICES_PATH
        await api.slices.put(endpoint_slice("db-a", "db", {**READY, "addresses": ["10.42.3.9"]}))
        await api.start(api.port)
        await names.until(["10.42.3.9"])

    story(tmp_path, tell, slices_path=OLD_SLICES_PATH)


def test_a_server_that_forgets_at_once_is_not_listed_in_a_hot_loop(tmp_path: Path) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        api.slices._oldest = 1 << 30
        asked = api.requests
        await asyncio.sleep(2)
        assert api.requests - asked < 40

    story(tmp_path, tell)


def test_what_was_forgotten_is_listed_again(tmp_path: Path) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        await api.slices.forget()
        await api.slices.put(MOVED)
        await names.until(["10.42.2.9"])

    story(tmp_path, tell)


def test_while_the_server_is_away_names_stay(tmp_path: Path) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        await api.stop()
        assert names.found() == ["10.42.1.5"]
        await api.slices.put(MOVED)
        await api.start(api.port)
        await names.until(["10.42.2.9"])

    story(tmp_path, tell)


def test_a_refusal_is_said_once_and_not_asked_over_and_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        api.forbidden = True
        asked = api.requests
        await asyncio.sleep(2)
        assert api.requests - asked < 20
        api.forbidden = False
        await api.slices.put(MOVED)
        await names.until(["10.42.2.9"])

    story(tmp_path, tell, seconds=1)
    said = [record.message for record in caplog.records if "services is forbidden" in record.message]
    assert 1 <= len(said) <= 4


def test_a_wrong_object_is_told_by_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def tell(api: ServiceApi, names: Names) -> None:
        await api.services.put(service("bad", clusterIPs=["x"]))
        await api.services.put(service("web", clusterIP="10.43.0.7"))
        await names.until(["10.43.0.7"], "web.shop.svc.cluster.local")

    story(tmp_path, tell)
    assert "the name of service/shop/bad is not up to date: clusterIPs has 'x'" in caplog.text
