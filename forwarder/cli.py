"""The `podloom` command's words: arguments in, an exit status out.

Exit status: 0 done, 1 failed, 2 wrong arguments or configuration. What went wrong is one sentence on
stderr for each fault; with --json stdout holds one JSON value and nothing else. What only one command
needs is imported by that command, so that asking a daemon stays quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwarder.control.client import ControlError, ask
from forwarder.control.messages import DEFAULT_RUN_DIR, SOCKET_NAME
from forwarder.faults import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(words).parse_args(words)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ControlError as error:
        return _fail(str(error), 1)
    except ConfigError as error:
        return _fail("\n".join(f"{arguments.config}: {fault}" for fault in error.faults), 2)
    except BrokenPipeError:
        # Our reader has read enough, as `head` does. Turn stdout away, or the interpreter's own last
        # flush complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return status


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line of these words: the demo's own arguments are only in it when asked for,
    since importing them takes longer than most commands do."""
    parser = argparse.ArgumentParser(
        prog="podloom", description="Pod-to-pod networking over Geneve and VXLAN, in user space."
    )
    parser.add_argument("--version", action=_VersionAction, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    about = "run this node's daemon"
    up = commands.add_parser("up", help=about, description=_sentence(about))
    _add_config(up)
    up.set_defaults(run=_up)

    for verb, about in (
        ("status", "what the daemon is, does and has counted"),
        ("peers", "the other nodes, how they are reached and what was sent"),
        ("drops", "what was not forwarded, by direction and reason"),
    ):
        command = commands.add_parser(verb, help=about, description=_sentence(about))
        _add_socket(command)
        command.set_defaults(run=_show, verb=verb)

    about = "switch one of the data plane's offloads while it runs"
    offload = commands.add_parser("offload", help=about, description=_sentence(about))
    offload.add_argument("name", metavar="NAME", help="as `podloom status` lists them")
    offload.add_argument("state", choices=("on", "off"))
    _add_socket(offload)
    offload.set_defaults(run=_offload, verb="offload")

    about = "what the resolver answers to pods: all records, or those of one name or address"
    names = commands.add_parser("names", help=about, description=_sentence(about))
    names.add_argument("name", metavar="NAME", nargs="?", help="whole, or without the cluster's domain")
    _add_socket(names)
    names.set_defaults(run=_names, verb="names")

    about = "check the configuration and print the effective one"
    config = commands.add_parser("config", help=about, description=_sentence(about))
    config.add_argument("--example", action="store_true", help="print a commented example instead")
    _add_config(config)
    config.set_defaults(run=_config)

    _add_cni(commands, words)

    about = "build a cluster of namespaces on this machine and check that its pods talk"
    demo = commands.add_parser("demo", help=about, description=_sentence(about))
    demo.set_defaults(run=_demo)
    if "demo" in words[:1]:
        from forwarder.demo import cli as demo_cli

        demo_cli.add_arguments(demo)
    return parser


def _add_cni(commands: Any, words: Sequence[str]) -> None:
    """What belongs to the CNI plugin; as with the demo, its arguments come with its words."""
    for word, about in (
        ("cni", "install the CNI plugin for container runtimes, or uninstall it"),
        ("pods", "what is attached on this node: pods, addresses, links, since when"),
    ):
        command = commands.add_parser(word, help=about, description=_sentence(about))
        if word in words[:1]:
            from cni import cli as cni_cli

            add_arguments, run = {
                "cni": (cni_cli.add_cni_arguments, cni_cli.run_cni),
                "pods": (cni_cli.add_pods_arguments, cni_cli.run_pods),
            }[word]
            add_arguments(command)
            command.set_defaults(run=run)


def _sentence(about: str) -> str:
    return about[0].upper() + about[1:] + "."


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        default=Path("/etc/podloom/podloom.toml"),
        help="default: %(default)s",
    )


def _add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon's control socket")
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="the daemon's configuration, to find its socket by",
    )


class _VersionAction(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from forwarder.version import podloom_version

        sys.stdout.write(f"podloom {podloom_version()}\n")
        parser.exit()


def _up(arguments: argparse.Namespace) -> int:
    from forwarder import daemon

    return daemon.run(arguments.config)


def _demo(arguments: argparse.Namespace) -> int:
    from forwarder.demo import cli as demo_cli

    return demo_cli.run(arguments)


def _config(arguments: argparse.Namespace) -> int:
    from forwarder import config

    sys.stdout.write(config.example() if arguments.example else config.render(config.load(arguments.config)))
    return 0


def _offload(arguments: argparse.Namespace) -> int:
    return _print(arguments, {"name": arguments.name, "on": arguments.state == "on"})


def _names(arguments: argparse.Namespace) -> int:
    return _print(arguments, {} if arguments.name is None else {"name": arguments.name})


def _show(arguments: argparse.Namespace) -> int:
    return _print(arguments)


def _print(arguments: argparse.Namespace, args: dict[str, object] | None = None) -> int:
    answer = ask(_socket(arguments), arguments.verb, args)
    if arguments.json:
        json.dump(answer, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        from forwarder import views

        views.show(arguments.verb, answer)
    return 0


def _socket(arguments: argparse.Namespace) -> Path:
    if arguments.socket is not None:
        return Path(arguments.socket)
    if arguments.config is not None:
        from forwarder import config

        return config.load(arguments.config).socket_path
    return Path(DEFAULT_RUN_DIR) / SOCKET_NAME


def _fail(text: str, status: int) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"podloom: {line}\n")
    return status
