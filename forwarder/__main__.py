"""The `podloom` command."""

from __future__ import annotations

import sys

from forwarder.cli import main

if __name__ == "__main__":
    sys.exit(main())
