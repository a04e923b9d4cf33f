"""Optional packages: importing one, whether one is there, and which release."""

from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType


def require(package: str, *, extra: str, wanted_by: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        ImportError: it is not installed; ``wanted_by`` begins the message. One that is there and cannot be imported
            speaks for itself.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{wanted_by} needs the package {package}, which is not installed; pip install 'ppo-core[{extra}]'"
        ) from error


def installed_version(distribution: str) -> str | None:
    """The release of an installed distribution; None if there is none, or if it was left half removed."""
    try:
        return metadata.version(distribution) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def can_be_found(package: str) -> bool:
    """Whether there is a package to import, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # sys.modules holds None for one that was made unimportable, or something odd
        return False
