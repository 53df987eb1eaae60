"""The `podloom-cni` process: the environment and stdin in, at most one JSON object on stdout."""

import os
import sys

from cni import plugin


def main() -> int:
    """Answer one CNI call; returns the exit code."""
    exit_code, stdout, stderr = plugin.run(os.environ, sys.stdin.buffer if sys.stdin else None)
    if stderr:
        sys.stderr.write(stderr)
    if stdout:
        sys.stdout.write(stdout)
        sys.stdout.flush()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
