"""The arguments of `podloom demo`. Light to import: every `podloom` command reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=_whole_number(2, 50), default=2, help="2 to 50 (default: 2)")
    parser.add_argument("--pods", type=_whole_number(1, 50), default=2, help="a node, 1 to 50 (default: 2)")
    parser.add_argument("--encap", choices=("geneve", "vxlan"), default="geneve", help="default: geneve")
    parser.add_argument("--underlay", choices=("ipv4", "ipv6"), default="ipv4", help="default: ipv4")
    parser.add_argument("--source", choices=("static", "etcd"), default="static", help="default: static")
    parser.add_argument("--keep", action="store_true", help="leave it running, and say how to look inside")
    parser.add_argument("--remove", metavar="NAME", help="only remove a demo that was kept")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from forwarder.demo import session

    return session.run(arguments)


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse
