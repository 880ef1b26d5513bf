"""Files and directories that appear whole or not at all: temporary name, fsync, rename, fsync of the folder.

Temporary names are hidden (``.NAME.tmp``) and fixed, so that what a killed process leaves is overwritten by the next
write. A write that fails (full disk) removes its temporary files and raises OSError naming the file; what stood
under the final name stays.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "atomic_directory",
    "atomic_file",
    "fsync_directory",
    "json_line",
    "naming_file",
    "read_jsonl",
    "remove_directory",
    "temporary_name",
    "write_json",
    "write_jsonl",
]

AT_FDCWD = -100
RENAME_EXCHANGE = 2
EXCHANGE_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def temporary_name(path: Path) -> Path:
    """Where a file or folder stands until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with naming_file(Path(folder) / name), open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Let every OSError inside name ``path`` (writing to an open file raises one without a name)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file to write; it replaces ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with naming_file(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path | str, *, before_rename: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """An empty folder to fill; it replaces ``path`` when the block ends without an error.

    ``before_rename`` is called in between, when everything is on the disk; an error of its own keeps what stood there.
    A folder that stands there is exchanged in one system call where the file system can do that (Linux, local disks);
    elsewhere it is renamed away first, and a kill between the two renames leaves it under ``.NAME.old``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    remove_directory(temporary)
    try:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        before_rename()
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
        fsync_directory(path.parent)
    finally:
        remove_directory(temporary)


def _exchange(temporary: Path, path: Path) -> None:
    """Put ``temporary`` at ``path`` and what was there at ``temporary``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in EXCHANGE_UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(path))
    replaced = path.with_name(f".{path.name}.old")
    remove_directory(replaced)
    os.rename(path, replaced)
    os.rename(temporary, path)
    os.rename(replaced, temporary)


def remove_directory(path: Path) -> None:
    """Remove a folder if it is there, under a temporary name first: no half-removed folder keeps its final name."""
    if not path.exists():
        return
    if not path.name.startswith("."):
        removed = path.with_name(f".{path.name}.tmp")
        remove_directory(removed)
        os.rename(path, removed)
        path = removed
    shutil.rmtree(path)


def json_line(row: dict[str, Any]) -> bytes:
    """One line of valid JSON (a non-finite number is an error here: callers decide what stands for it)."""
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def write_json(path: Path | str, value: Any) -> None:
    """Write one JSON document atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line atomically."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json_line(row))


def read_jsonl(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every line; ValueError names file and line of one that is not an object."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, row
