"""podloom's own version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def podloom_version() -> str:
    """The installed distribution's version, or "uninstalled" when run from a source tree without one."""
    try:
        return version("podloom")
    except PackageNotFoundError:
        return "uninstalled"
