"""Which NVIDIA Dynamo this worker was tested with. Others are refused: its Python interface changes between minors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dsv4c.errors import ConfigError

TESTED = ("1.6.1",)
PACKAGES = ("ai-dynamo", "ai-dynamo-runtime")
_INSTALL = "CONTRIBUTING.md says how to install it"


def check_installed() -> str:
    """The version that is installed. Raises ConfigError if there is none, or one that was not tested."""
    return check_versions({package: _version(package) for package in PACKAGES})


def check_versions(found: dict[str, str | None]) -> str:
    """The one version of these packages. Raises ConfigError as `check_installed` does."""
    for package, has in found.items():
        if has is None:
            raise ConfigError(f"NVIDIA Dynamo is not installed: there is no package `{package}`", hint=_INSTALL)
        if has not in TESTED:
            raise ConfigError(
                f"`{package}` is {has}, this worker was tested with {' and '.join(TESTED)} alone", hint=_INSTALL
            )
    if len(set(found.values())) != 1:
        both = ", ".join(f"`{package}` is {has}" for package, has in found.items())
        raise ConfigError(f"the packages of NVIDIA Dynamo do not belong together: {both}", hint=_INSTALL)
    return str(next(iter(found.values())))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
