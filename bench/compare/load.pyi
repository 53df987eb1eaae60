def offer(fd: int, size: int, rate: float, seconds: float) -> tuple[int, float]:
    """Send datagrams of `size` bytes from a connected socket by plain sendmmsg, each a packet of its own, at
    `rate` a second or as fast as it goes (0); (sent, seconds it took)."""

def count(fd: int, stop_fd: int, idle_seconds: float, seconds: float) -> int:
    """Receive from a bound socket until `stop_fd` is readable and then nothing has come for `idle_seconds`,
    or for `seconds` at most; how many datagrams came."""

def echo(fd: int, seconds: float) -> None:
    """Send back whatever a bound socket receives, until a datagram of one byte or for `seconds`."""

def ask(fd: int, size: int, icmp: bool, seconds: float) -> tuple[int, int, float, float]:
    """One request after the other, each when the last is answered; (answers, lost, p50, p99 in seconds).

    The connected socket is UDP towards an echo(), or raw ICMP: then requests are echo requests of `size`
    bytes from the ICMP header on (even, at least 8), and the far kernel answers."""
