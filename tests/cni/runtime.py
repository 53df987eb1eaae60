"""A container runtime reduced to what libcni does: chains of plugins, capabilities, and who gets what result.

Source: containernetworking/cni libcni/api.go and SPEC.md 1.1.0, section 3.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cni import install

DEBIAN_PLUGINS = Path("/usr/lib/cni")


def debian_plugins(*names: str) -> None:
    """Skip where Debian's containernetworking-plugins does not have them."""
    import pytest

    missing = [name for name in names if not (DEBIAN_PLUGINS / name).exists()]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} (Debian package containernetworking-plugins): chaining is NOT tested"
        )


@dataclass
class PluginError(Exception):
    """A plugin that ended with an error, and what it printed."""

    plugin: str
    body: dict[str, Any]


@dataclass
class Runtime:
    """Runs `plugins` for pods of one node, whose namespace is `node`; finds them in `paths`."""

    node: str
    plugins: Sequence[Mapping[str, Any]]
    paths: Sequence[Path]
    name: str = "podnet"
    version: str = "1.0.0"
    results: dict[tuple[str, str], Any] = field(default_factory=dict)

    def add(self, pod: str, ifname: str = "eth0", args: str = "", **capabilities: Any) -> Any:
        previous = None
        for plugin in self.plugins:
            conf = self._conf(plugin, previous, capabilities)
            previous = self._run("ADD", plugin, conf, pod, ifname, args)
        self.results[pod, ifname] = previous
        return previous

    def check(self, pod: str, ifname: str = "eth0", but: Sequence[str] = (), **capabilities: Any) -> None:
        for plugin in (plugin for plugin in self.plugins if plugin["type"] not in but):
            conf = self._conf(plugin, self.results[pod, ifname], capabilities)
            self._run("CHECK", plugin, conf, pod, ifname)

    def delete(self, pod: str, ifname: str = "eth0", **capabilities: Any) -> None:
        for plugin in reversed(self.plugins):
            conf = self._conf(plugin, self.results.get((pod, ifname)), capabilities)
            self._run("DEL", plugin, conf, pod, ifname)
        self.results.pop((pod, ifname), None)

    def collect(self, valid: Sequence[tuple[str, str]]) -> list[PluginError]:
        """GC as libcni calls it, which goes on after errors."""
        listed = [{"containerID": container, "ifname": ifname} for container, ifname in valid] or None
        failures = []
        for plugin in self.plugins:
            conf = self._conf(plugin, None, {})
            conf |= {"cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}
            try:
                self._run("GC", plugin, conf)
            except PluginError as error:
                failures.append(error)
        return failures

    def status(self) -> None:
        for plugin in self.plugins:
            self._run("STATUS", plugin, self._conf(plugin, None, {}))

    def _conf(
        self, plugin: Mapping[str, Any], previous: Any, capabilities: Mapping[str, Any]
    ) -> dict[str, Any]:
        conf = {key: value for key, value in plugin.items() if key != "capabilities"}
        conf |= {"cniVersion": self.version, "name": self.name}
        declared = plugin.get("capabilities", {})
        given = {key: value for key, value in capabilities.items() if declared.get(key)}
        if given:
            conf["runtimeConfig"] = given
        if previous is not None:
            conf["prevResult"] = previous
        return conf

    def _run(
        self,
        command: str,
        plugin: Mapping[str, Any],
        conf: Mapping[str, Any],
        pod: str = "",
        ifname: str = "",
        args: str = "",
    ) -> Any:
        env = {"CNI_COMMAND": command, "CNI_PATH": ":".join(map(str, self.paths))}
        if pod:
            env |= {"CNI_CONTAINERID": pod, "CNI_NETNS": f"/run/netns/{pod}", "CNI_IFNAME": ifname}
        if args:
            env["CNI_ARGS"] = args
        path = next(
            path for path in (directory / plugin["type"] for directory in self.paths) if path.exists()
        )
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.node}", str(path)],
            input=json.dumps(conf),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=env | {"PATH": os.environ["PATH"]},
        )
        if done.returncode != 0:
            raise PluginError(plugin["type"], json.loads(done.stdout or "{}") | {"stderr": done.stderr})
        return json.loads(done.stdout) if done.stdout.strip() else None


def installed_plugin(directory: Path) -> Path:
    """A directory with our plugin as `podloom cni install` places it."""
    install.install(directory / "bin", directory / "conf")
    return directory / "bin"
