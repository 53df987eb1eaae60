"""The resolver's process, started by the daemon."""

from __future__ import annotations

from forwarder.names.server import main

if __name__ == "__main__":
    main()
