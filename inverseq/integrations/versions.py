"""Which versions of other packages the adapters were tested with, and what is said about any other.

An older one is an error, since something that an adapter needs may not be there; a newer one is a warning.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

__all__ = ["TESTED", "check_version", "describe_tested", "installed_version", "is_tested"]

logger = logging.getLogger(__name__)

TESTED = {  # from, below
    "accelerate": ("1.10", "1.16"),
    "deepspeed": ("0.19", "0.20"),
    "peft": ("0.20", "0.22"),
    "transformers": ("5.10", "5.24"),
    "trl": ("1.16", "1.17"),
}
said: set[str] = set()


def check_version(package: str, *, extra: str, what: str) -> None:
    """Raise ValueError when ``package`` is missing or older than tested; a newer one is said once, in the log.

    ``what`` needs it, and ``pip install 'inverseq[extra]'`` brings it.
    """
    found = installed_version(package, extra=extra, what=what)
    message = f"{package} {found}: {what} was tested with {describe_tested(package)}"
    if release(found) < release(TESTED[package][0]):
        raise ValueError(message)
    if not is_tested(package, found) and message not in said:
        said.add(message)
        logger.warning("%s", message)


def installed_version(package: str, *, extra: str, what: str) -> str:
    """The version that is installed; ValueError when there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        raise ValueError(f"{what}: needs {package} (pip install 'inverseq[{extra}]')") from None


def is_tested(package: str, found: str) -> bool:
    first, last = TESTED[package]
    return release(first) <= release(found) < release(last)


def describe_tested(package: str) -> str:
    """ "trl >= 1.16, < 1.17"."""
    return "{} >= {}, < {}".format(package, *TESTED[package])


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: 1.17.0.dev0 is (1, 17, 0), a release candidate of it too."""
    return Version(text).release
