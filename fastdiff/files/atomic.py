"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

A file is written under a hidden name beside its place, fsynced, renamed. A folder likewise, except that a rename
cannot replace a folder with something in it. Where the system can (Linux renameat2) the old and the new one are
*exchanged*, so that `path` is never missing. Elsewhere (macOS, NFS) the old one is first renamed to
`.<name>.fastdiff-old`; `find_folder` gives that one while `path` is missing, and the next write puts it back.
So a crash leaves the old or the new folder, and what else it leaves is removed by the next write. One writer a path:
of two at the same time one gets an error or is replaced, but they never mix.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its place at `path` when the block ends well, and leaves nothing when it does not.

    durable=False does not wait for the disk (about 5 ms a file): whole if the process stops, not if the machine does.
    """
    new = _hidden(path, "new")
    try:
        with open(new, "xb") as out:
            yield out
            out.flush()
            if durable:
                os.fsync(out.fileno())
        os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, f"{path}: not written: {error.strerror or error}") from error
    finally:
        # below a file, unlink fails like the open did
        with contextlib.suppress(OSError):
            new.unlink()


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes its place at `path` when the block ends well.

    The block fsyncs the files that it writes; the folder and its parent are fsynced here. Missing parents are made.
    A crash or an exception leaves what was at `path`.
    """
    _make_parents(path.parent)
    _recover(path)
    new = _hidden(path, "new")
    new.mkdir()
    try:
        yield new
        sync(new)
        _swap(new, path)
        sync(path.parent)
    finally:
        # `new` is now what failed, or the folder that was exchanged with it
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(_aside(path), ignore_errors=True)


def find_folder(path: Path) -> tuple[Path, tuple[int, int, int]]:
    """The folder to read for `path`, and its identity: ask again after reading, and trust only the same answer."""
    for folder in (path, _aside(path), path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            stat = os.stat(folder)
            return folder, (stat.st_dev, stat.st_ino, stat.st_mtime_ns)
    raise FileNotFoundError(f"{path}: nothing there; check the path")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_parents(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder; choose another path")
    _make_parents(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def _recover(path: Path) -> None:
    """Put the folder back that a crash between two renames left aside; remove what else crashes left."""
    if _aside(path).exists() and not path.exists():
        os.rename(_aside(path), path)
    for left in path.parent.glob(glob.escape(f".{path.name}.fastdiff-") + "*"):
        # renamed first: a second writer whose folder this is then fails at its own rename, never half-way
        dead = _hidden(path, "dead")
        with contextlib.suppress(FileNotFoundError):
            os.rename(left, dead)
        shutil.rmtree(dead, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path`; what was there is at `new` or aside afterwards."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        os.rename(path, _aside(path))
        try:
            os.rename(new, path)
        except OSError:
            os.rename(_aside(path), path)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    # -100 is AT_FDCWD, 2 is RENAME_EXCHANGE
    return bool(renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.fastdiff-old")


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.fastdiff-{kind}-{secrets.token_hex(4)}")
