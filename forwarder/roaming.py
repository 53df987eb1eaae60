"""Finding out where a peer is that a NAT hides, or that has moved: by probes which prove themselves. Pure.

Both nodes have the cluster's key. Each says *hello* to the others, from the port it receives on. Who hears a
hello from where the peer is not known to be sends a *challenge* there; its *response*, from the same place,
moves the peer. The challenge holds a cookie that only its sender can make, for that peer and place and only
for some seconds: so a hello or a response that somebody recorded moves nobody, and nothing is remembered of
strangers.

Every message is 64 bytes, and none is answered by a longer one or by more than one:

    tag (3), kind (1), from (8), to (8), number (8), cookie (8), zeroes (12), MAC (16)

`from` and `to` are the beginning of the SHA-256 of the node's id; `number` is of the hello, and is repeated
in what follows it; the MAC is the beginning of the HMAC-SHA-256 of all before it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

from forwarder.addresses import Address
from forwarder.probe import PROBE_BYTES, TAG

HELLO: Final = 0x10
CHALLENGE: Final = 0x11
RESPONSE: Final = 0x12

MIN_KEY_BYTES: Final = 16
MAC_BYTES: Final = 16
NAME_BYTES: Final = 8
NUMBER_BYTES: Final = 8

HELLO_SECONDS: Final = 3.0
"""Between two hellos to a peer: NATs forget a UDP flow after 30 seconds or more (RFC 4787 section 4.3)."""

LOOK_SECONDS: Final = 0.25
HELLOS: Final = 128
"""In one look at most: with more peers than go into HELLO_SECONDS so, there is more between two."""

COOKIE_SECONDS: Final = 5.0
"""How long a challenge can be answered, at least; at most twice that."""

_MESSAGE: Final = struct.Struct("!3sB8s8s8s8s12x")

Place: TypeAlias = tuple[Address, int]
"""An outer address and UDP port."""


@dataclass(frozen=True, slots=True)
class Message:
    kind: int
    sender: bytes
    receiver: bytes
    number: bytes
    cookie: bytes = bytes(NUMBER_BYTES)


@dataclass(frozen=True, slots=True)
class Answer:
    """A message for a peer, to the place it is said to be at."""

    peer_id: str
    place: Place
    probe: bytes


@dataclass(frozen=True, slots=True)
class Moved:
    """The peer is there: it has proved it."""

    peer_id: str
    place: Place


def encode(message: Message, key: bytes) -> bytes:
    body = _MESSAGE.pack(TAG, message.kind, message.sender, message.receiver, message.number, message.cookie)
    return body + _mac(key, body)


def decode(probe: bytes, key: bytes) -> Message | None:
    """None if it is not authentic, or nothing that this version knows."""
    if len(probe) != PROBE_BYTES or probe[:3] != TAG or probe[3] not in (HELLO, CHALLENGE, RESPONSE):
        return None
    body, mac = probe[:-MAC_BYTES], probe[-MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(key, body)):
        return None
    _, kind, sender, receiver, number, cookie = _MESSAGE.unpack(body)
    return Message(kind, sender, receiver, number, cookie)


def name_of(node_id: str) -> bytes:
    return hashlib.sha256(node_id.encode()).digest()[:NAME_BYTES]


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:MAC_BYTES]


@dataclass(slots=True)
class _Peer:
    peer_id: str
    name: bytes
    hello_at: float
    number: bytes = b""
    """Of our last hello; a challenge must repeat it."""


class Roaming:
    """Say `hellos` from time to time, and `hear` what comes. `now` is any clock that only goes forward."""

    def __init__(self, node_id: str, key: bytes, random_bytes: Callable[[int], bytes]) -> None:
        """`key` is the cluster's. `random_bytes` must be unpredictable."""
        self._name = name_of(node_id)
        self._key = key
        self._random_bytes = random_bytes
        self._secret = random_bytes(32)
        self._peers: dict[bytes, _Peer] = {}
        self._look_at = float("-inf")

    def add(self, peer_id: str, now: float) -> None:
        """A peer that has agreed to it. One that is there stays as it is."""
        name = name_of(peer_id)
        self._peers.setdefault(name, _Peer(peer_id, name, hello_at=now))

    def remove(self, peer_id: str) -> None:
        """Forget a peer, if it is there."""
        self._peers.pop(name_of(peer_id), None)

    def hellos(self, now: float) -> list[tuple[str, bytes]]:
        """Some of those that are due: peer and message, for the place where the peer is known to be."""
        if now < self._look_at:
            return []
        self._look_at = now + LOOK_SECONDS
        pause = max(HELLO_SECONDS, len(self._peers) / HELLOS * LOOK_SECONDS)
        due = list(islice((peer for peer in self._peers.values() if now >= peer.hello_at), HELLOS))
        for peer in due:
            self._peers[peer.name] = self._peers.pop(peer.name)  # behind those that wait longer
            peer.hello_at = now + pause
            peer.number = self._random_bytes(NUMBER_BYTES)
        return [(peer.peer_id, self._message(HELLO, peer, peer.number)) for peer in due]

    def hear(
        self,
        probe: bytes,
        place: Place,
        owner: Callable[[], str | None],
        places_of: Callable[[str], Collection[Place]],
        now: float,
    ) -> Answer | Moved | None:
        """What follows from a message that came from `place`. `owner` says whose that address is already, if
        it is a peer's; `places_of` a peer, where it is known to be."""
        message = decode(probe, self._key)
        if message is None or message.receiver != self._name:
            return None
        peer = self._peers.get(message.sender)
        if peer is None:
            return None
        if message.kind == CHALLENGE:
            # Only from a place that is the challenger's: nobody else can make us show ourselves.
            if owner() != peer.peer_id or message.number != peer.number:
                return None
            return Answer(peer.peer_id, place, self._message(RESPONSE, peer, message.number, message.cookie))
        if place in places_of(peer.peer_id) or owner() not in (None, peer.peer_id):
            return None
        if message.kind == HELLO:
            cookie = self._cookie(peer, place, message.number, self._period(now))
            return Answer(peer.peer_id, place, self._message(CHALLENGE, peer, message.number, cookie))
        for period in (self._period(now), self._period(now) - 1):
            if hmac.compare_digest(message.cookie, self._cookie(peer, place, message.number, period)):
                return Moved(peer.peer_id, place)
        return None

    def _message(self, kind: int, peer: _Peer, number: bytes, cookie: bytes = bytes(NUMBER_BYTES)) -> bytes:
        return encode(Message(kind, self._name, peer.name, number, cookie), self._key)

    def _cookie(self, peer: _Peer, place: Place, number: bytes, period: int) -> bytes:
        address, port = place
        said = struct.pack("!Hq", port, period) + number + peer.name + address.packed
        return hmac.digest(self._secret, said, "sha256")[:NUMBER_BYTES]

    def _period(self, now: float) -> int:
        return int(now // COOKIE_SECONDS)
