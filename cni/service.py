"""CNI calls answered in a process that stays: the daemon, or the plugin itself while the daemon is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cni import commands
from cni.commands import NodeNetwork
from cni.netlink import Netlink, NetlinkError
from cni.request import Request, parse
from cni.result import CniError, Code, error_json, result_json, version_json
from cni.store import Store, StoreError

__all__ = ["CniService", "NodeNetwork"]

_LOCKS = 64


@dataclass(frozen=True)
class _Hands:
    """What one call at a time works with."""

    store: Store
    host: Netlink

    def close(self) -> None:
        self.store.close()
        self.host.close()


class CniService:
    """Answers CNI calls on any thread; calls for the same attachment wait for each other.

    `network` may be replaced at any time and holds for calls that come later; None refuses ADD.
    Netlink sockets open in the network namespace of the calling thread, which must be the node's.
    """

    def __init__(self, network: NodeNetwork | None, state_dir: Path) -> None:
        self.network = network
        self._state_dir = state_dir
        self._idle: list[_Hands] = []
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def close(self) -> None:
        """Close what idles; to be called when no call is under way."""
        while self._idle:
            self._idle.pop().close()

    def handle(self, env: Mapping[str, str], stdin: str) -> tuple[int, str]:
        """(exit code, stdout) of one call. Never raises: a failure is the spec's error object."""
        version: str | None = None
        try:
            request = parse(env, stdin.encode(errors="surrogatepass"))
            version = request.version
            return 0, self._answer(request)
        except CniError as error:
            failure = error
        except StoreError as error:
            failure = CniError(Code.IO_FAILURE, f"the address store cannot be used: {error}")
        except NetlinkError as error:
            failure = CniError(Code.KERNEL_REFUSED, str(error.strerror))
        except OSError as error:
            failure = CniError(Code.IO_FAILURE, str(error))
        except Exception as error:
            failure = CniError(Code.INTERNAL, f"{type(error).__name__}: {error}")
        failure.version = failure.version or version
        return 1, error_json(failure)

    def _answer(self, request: Request) -> str:
        if request.command == "VERSION":
            return version_json(request.version)
        with self._locks[hash(request.attachment) % _LOCKS], self._hands() as hands:
            match request.command:
                case "ADD":
                    if self.network is None:
                        raise CniError(
                            Code.TRY_AGAIN_LATER,
                            "no podloom daemon serves this node; start it with `podloom up`",
                        )
                    made = commands.add(request, self.network, hands.store, hands.host, time.time())
                    return result_json(made, request.version)
                case "DEL":
                    commands.delete(request, hands.store, hands.host, time.time())
                case "CHECK":
                    commands.check(request, hands.store, hands.host)
        return ""

    @contextmanager
    def _hands(self) -> Iterator[_Hands]:
        """Idle ones if there are any; kept for the next call unless this one ended in an unforeseen way."""
        try:
            hands = self._idle.pop()
        except IndexError:
            hands = _Hands(Store(self._state_dir, _boot_id(), time.time()), Netlink())
        try:
            yield hands
        except CniError:
            self._idle.append(hands)
            raise
        except BaseException:
            hands.close()
            raise
        self._idle.append(hands)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
