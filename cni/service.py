"""CNI calls answered in a process that stays: the daemon, or the plugin itself while the daemon is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cni import commands, upkeep
from cni.commands import NodeNetwork
from cni.netlink import Netlink, NetlinkError
from cni.reattach import reattach
from cni.request import Attachment, Request, parse
from cni.result import CniError, Code, error_json, result_json, version_json
from cni.store import FILE_NAME, Record, Store, StoreError

__all__ = ["CniService", "NodeNetwork"]

NO_DAEMON = "no podloom daemon serves this node's pods; start it with `podloom up`"

# Without a daemon nothing is forwarded either, so pods that exist suffer too.
_NEED_DAEMON = {"ADD": Code.TRY_AGAIN_LATER, "STATUS": Code.LIMITED_CONNECTIVITY}


class _Turn:
    """Who is at work for one attachment, and how many are or want to be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.callers = 0


class CniService:
    """Answers CNI calls on any thread; calls for the same attachment wait for each other.

    `network` may be replaced at any time and holds for calls that come later; None refuses ADD, and so does
    a fence.
    Netlink sockets open in the network namespace of the calling thread, which must be the node's.
    """

    def __init__(self, network: NodeNetwork | None, state_dir: Path) -> None:
        self.network = network
        self._fence = ""
        self._state_dir = state_dir
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._idle: list[Netlink] = []
        self._turns: dict[Attachment, _Turn] = {}
        self._counting = threading.Lock()

    def fence(self, reason: str) -> None:
        """No pod may be added from now on, and why; "" for one may."""
        self._fence = reason

    def close(self) -> None:
        """Close the store and the sockets; to be called when no call is under way."""
        while self._idle:
            self._idle.pop().close()
        if self._store is not None:
            self._store.close()
            self._store = None

    def handle(self, env: Mapping[str, str], stdin: str, began_at: float | None = None) -> tuple[int, str]:
        """(exit code, stdout) of one call. Never raises: a failure is the spec's error object.

        `began_at` is when the caller began, by `boot_clock`: calls wait for one another on their way here.
        """
        began_at = boot_clock() if began_at is None else min(began_at, boot_clock())
        version: str | None = None
        try:
            request = parse(env, stdin.encode(errors="surrogatepass"))
            version = request.version
            return 0, self._answer(request, began_at)
        except CniError as error:
            failure = error
        except StoreError as error:
            # A node whose store is broken cannot serve ADD, and STATUS has a code for that.
            code = Code.CANNOT_ADD if env.get("CNI_COMMAND") == "STATUS" else Code.IO_FAILURE
            failure = CniError(code, f"the address store cannot be used: {error}")
        except NetlinkError as error:
            failure = CniError(Code.KERNEL_REFUSED, str(error.strerror))
        except OSError as error:
            failure = CniError(Code.IO_FAILURE, str(error))
        except Exception as error:
            failure = CniError(Code.INTERNAL, f"{type(error).__name__}: {error}")
        failure.version = failure.version or version
        return 1, error_json(failure)

    def reattach(self, network: NodeNetwork) -> list[str]:
        """This is the node's network from now on: bring the pods that run to it, as `reattach.reattach`.
        Never raises."""
        before, self.network = self.network, network
        try:
            records = self._opened_store().records()
            with self._netlink() as host:
                return reattach(records, before or network, network, host, self._alone_with)
        except (StoreError, OSError) as error:
            return [f"pods are not attached anew: {error}"]

    def _answer(self, request: Request, began_at: float) -> str:
        if request.command == "VERSION":
            return version_json(request.version)
        network = self.network
        if network is None and request.command in _NEED_DAEMON:
            raise CniError(_NEED_DAEMON[request.command], NO_DAEMON)
        if self._fence and request.command in _NEED_DAEMON:
            raise CniError(_NEED_DAEMON[request.command], self._fence)
        store = self._opened_store()
        with self._netlink() as host:
            match request.command:
                case "GC":
                    upkeep.collect(request, store, host, self._alone_with, began_at)
                case "STATUS":
                    assert network is not None  # noqa: S101 (refused above)
                    upkeep.status(request, network, store, host, boot_clock())
                case _:
                    with self._alone_with(request.attachment):
                        return self._answer_about(request, network, store, host)
        return ""

    def _answer_about(
        self, request: Request, network: NodeNetwork | None, store: Store, host: Netlink
    ) -> str:
        match request.command:
            case "ADD":
                assert network is not None  # noqa: S101 (refused above)
                made = commands.add(request, network, store, host, boot_clock)
                self._catch_up(request.attachment, network, store, host)
                return result_json(made, request.version)
            case "DEL":
                commands.delete(request, store, host, boot_clock())
            case "CHECK":
                commands.check(request, store, host)
                if network is None:
                    raise CniError(
                        Code.TRY_AGAIN_LATER, f"{NO_DAEMON}: this pod is as it was made, but cut off"
                    )
        return ""

    def _catch_up(self, attachment: Attachment, network: NodeNetwork, store: Store, host: Netlink) -> None:
        """Reattach a pod if the node has changed while it was attached: `reattach` may have missed it."""
        if (now := self.network) is None or now is network:
            return
        with suppress(StoreError, OSError):  # The pod is attached, and an MTU is not worth undoing that for.
            record = store.find(attachment)
            reattach([record] if record else [], network, now, host, lambda _: nullcontext())

    @contextmanager
    def _alone_with(self, attachment: Attachment) -> Iterator[None]:
        with self._counting:
            turn = self._turns.setdefault(attachment, _Turn())
            turn.callers += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._counting:
                turn.callers -= 1
                if not turn.callers:
                    del self._turns[attachment]

    def _opened_store(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = Store(self._state_dir, _boot_id(), boot_clock())
            return self._store

    @contextmanager
    def _netlink(self) -> Iterator[Netlink]:
        """An idle socket if there is one; kept for the next call unless this one broke down."""
        try:
            host = self._idle.pop()
        except IndexError:
            host = Netlink()
        try:
            yield host
        except CniError:
            self._idle.append(host)
            raise
        except BaseException:
            host.close()
            raise
        self._idle.append(host)


def boot_clock() -> float:
    """Seconds since the machine started: the same for every process, and nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_records(state_dir: Path) -> list[Record]:
    """What a node's store holds; nothing, and no store made, where there is none yet."""
    if not (state_dir / FILE_NAME).exists():
        return []
    store = Store(state_dir, _boot_id(), boot_clock())
    try:
        return store.records()
    finally:
        store.close()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
