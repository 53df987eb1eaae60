def looks(waits: list[tuple[int, int]], *, on: bool = True) -> list[int]:
    """Play waits one after the other, each (nanoseconds until a packet comes, nanoseconds from look to look);
    how many looks each got before the packet came or the pump went to sleep."""
