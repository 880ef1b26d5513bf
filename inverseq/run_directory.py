"""The run directory: whether a configuration may write there, and the configuration it holds.

``RUN/config.yaml`` is the first file of a run, so a folder belongs to the run whose configuration it holds. A resumed
run may differ in what does not change its results (where it stands, what it logs, how many checkpoints it keeps) and,
under the constant schedule, in its number of epochs. One process at a time writes there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO

from .atomic import atomic_file
from .config import Config, ServerConfig
from .config_loading import config_differences, load_config, to_yaml

__all__ = ["check_run_directory", "has_begun", "sole_writer", "write_run_config"]

logger = logging.getLogger(__name__)

LOCK = ".lock"  # hidden, so that a folder that holds it alone counts as empty

RESUMABLE_KEYS = ("run_dir", "logging.tensorboard", "logging.wandb", "checkpoint.keep_last")
RESUMABLE_KEYS += tuple(
    f"engine.{key}" for key in ("kind", "zero_stage", "offload_optimizer", "offload_parameters", "frozen")
)
RESUMABLE_KEYS += tuple(f"sampling.server.{item.name}" for item in fields(ServerConfig) if item.name != "static")


def check_run_directory(config: Config, *, resume: bool) -> Path:
    """The run directory, which is new or empty, or with ``resume`` holds a run of this configuration.

    Raises ValueError for a folder of another run (naming what differs), an existing run without ``resume``, no run with
    it, a folder of other things, a file, and a place where nothing can be written. Writes nothing.
    """
    run_dir = Path(config.run_dir).expanduser()
    where = f"run_dir={config.run_dir!r}"
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{where}: is a file; expected a folder")
    names = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []
    visible = [name for name in names if not name.startswith(".")]  # hidden ones are left by a killed write
    if not visible:
        if resume:
            raise ValueError(f"{where}: holds no run to resume; start one without --resume")
        check_writable(run_dir, where)
        return run_dir
    if "config.yaml" not in visible:
        raise ValueError(f"{where}: is not empty and holds no run ({', '.join(visible[:3])} …); choose another folder")
    check_same_run(config, run_dir, where)
    if not resume:
        raise ValueError(f"{where}: holds this run already; --resume continues it, or choose another run_dir")
    check_writable(run_dir, where)
    return run_dir


@contextmanager
def sole_writer(config: Config, *, resume: bool) -> Iterator[None]:
    """Make the run directory and hold it while the block runs; a process that dies lets go of it.

    A directory that is empty at the end goes again. Raises ValueError when another process holds it, or has begun a run
    there since it was checked. Where the file system knows no locks the log says that there is none.
    """
    run_dir, where = Path(config.run_dir).expanduser(), f"run_dir={config.run_dir!r}"
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "w") as file:
        if not is_locked_by_us(file, where):
            raise ValueError(f"{where}: another process trains there; wait for it, or choose another run_dir")
        try:
            check_run_directory(config, resume=resume)
            yield
        finally:
            (run_dir / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it holds a run, or what it held before
                run_dir.rmdir()


def is_locked_by_us(file: IO[str], where: str) -> bool:
    """Take the lock on an open file, if it is free and the file was not removed meanwhile; at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
        logger.warning("%s: cannot be locked (%s): start no other run there", where, error.strerror)
    return os.fstat(file.fileno()).st_nlink > 0


def has_begun(config: Config) -> bool:
    """Whether the run directory holds a run, of this configuration or another."""
    return (Path(config.run_dir).expanduser() / "config.yaml").exists()


def check_same_run(config: Config, run_dir: Path, where: str) -> None:
    """Raise ValueError naming what differs between a configuration and the one a run directory holds."""
    try:
        theirs = load_config(run_dir / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{where}: the configuration of the run it holds cannot be read: {error}") from None
    ignored = (*RESUMABLE_KEYS, "epochs") if config.optim.schedule == "constant" else RESUMABLE_KEYS
    differences = config_differences(config, theirs, ignore=ignored)
    if differences:
        raise ValueError(
            f"{where}: holds another run: {'; '.join(differences)} (--config {run_dir / 'config.yaml'} --resume "
            "continues that one)"
        )


def check_writable(folder: Path, where: str) -> None:
    """Raise ValueError when the folder, or the nearest one above it that exists, cannot be written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{where}: {existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{where}: {existing} cannot be written to")


def write_run_config(config: Config, run_dir: Path) -> None:
    """Create the run directory and write its ``config.yaml``, whole or not at all."""
    with atomic_file(run_dir / "config.yaml") as file:
        file.write(to_yaml(config).encode())
