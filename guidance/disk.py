"""Atomic writes of files, safe with other processes that write to the same folder."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import BinaryIO

from .errors import GuidanceError, pass_out_of_memory, short


def write(
    path: Path,
    save: Callable[[Path], object],
    advice: str = "Correct that and run again: it continues from here.",
    new: bool = False,
) -> None:
    """Write a file atomically: `save` is called with a temporary path.

    Raises GuidanceError with `advice` if that fails.

    new: raise FileExistsError if the file exists, even if another process creates it at the same time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as partial:
            save(partial)
            taken = not (created if new else replaced)(partial, path)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was written")
        raise GuidanceError(
            f"{path.name} could not be written ({short(str(error).partition(chr(10))[0])}). {advice}"
        ) from error
    if taken:
        raise FileExistsError(path)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A temporary path in a folder beside `path`; a folder, because savers create temporary files of their own.

    The folder has a fixed name, so that the next write deletes what a killed process left behind. If another process is
    using it, a folder with a random name is used instead.
    """
    folder = path.with_name(f"{path.name}.partial")
    with suppress(FileExistsError):
        folder.mkdir()
    with held(folder) as own:
        if not own:
            folder = path.with_name(f"{path.name}.{token_hex(4)}.partial")
            folder.mkdir()
        try:
            yield folder / "whole"
        finally:
            rmtree(folder, ignore_errors=True)


def replaced(partial: Path, path: Path) -> bool:
    """Rename a file, and replace an existing one. Always True."""
    os.replace(partial, path)
    return True


def created(partial: Path, path: Path) -> bool:
    """Rename a file, unless the new name exists. Whether it was renamed."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # some file systems have no hard links
        return not path.exists() and replaced(partial, path)
    return True


if sys.platform == "win32":

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Whether no process has the file, or a file in the folder, open: only then can it be renamed."""
        aside = path.with_name(f"{path.name}.{token_hex(4)}")
        try:
            path.rename(aside).rename(path)
            own = True
        except OSError:
            own = False
        yield own

    def in_use(path: Path) -> BinaryIO:
        """Open a file. `held` is False for it until it is closed."""
        return path.open("rb")
else:
    import fcntl

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Lock a file or folder in this context. False if another process has locked it, or it does not exist."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            yield False
            return
        try:
            yield locked(descriptor, fcntl.LOCK_EX) and is_at(descriptor, path)
        finally:
            os.close(descriptor)

    def in_use(path: Path) -> BinaryIO:
        """Open a file. `held` is False for it until it is closed."""
        file = path.open("rb")
        locked(file.fileno(), fcntl.LOCK_SH)
        return file

    def locked(descriptor: int, kind: int) -> bool:
        """Lock an open file until it is closed. False if another process has locked it."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def is_at(descriptor: int, path: Path) -> bool:
        """Whether an open file still has this path: it may have been deleted before it was locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError:
            return False
