"""Saves files whole or not at all, beside other processes that write to the same folder."""

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
    advice: str = "Mend that and run again: it goes on from here.",
    new: bool = False,
) -> None:
    """Save to a path, whole or not at all. Raises GuidanceError, with advice, where the disk does not take it.

    new: raise FileExistsError where the path has a file already, also where another process writes it at this moment.
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
    """Where to write what will be renamed to a path: in a folder beside it, as savers have temporary files of their own. A path
    has one such folder, so that what a killed process leaves is deleted by the next; while another process writes in it, this
    one has another."""
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
    """Give a file a name, in place of what had it."""
    os.replace(partial, path)
    return True


def created(partial: Path, path: Path) -> bool:
    """Give a file a name that no other has. False where one has."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # some disks know no links
        return not path.exists() and replaced(partial, path)
    return True


if sys.platform == "win32":

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Whether nobody has a file, or one in a folder, open: only then it can be renamed."""
        aside = path.with_name(f"{path.name}.{token_hex(4)}")
        try:
            path.rename(aside).rename(path)
            own = True
        except OSError:
            own = False
        yield own

    def in_use(path: Path) -> BinaryIO:
        """Open a file, so that `held` is False for it until it is closed."""
        return path.open("rb")
else:
    import fcntl

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Hold a file or folder until this process ends or lets go. False where another holds it, or it is gone."""
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
        """Open a file, so that `held` is False for it until it is closed."""
        file = path.open("rb")
        locked(file.fileno(), fcntl.LOCK_SH)
        return file

    def locked(descriptor: int, kind: int) -> bool:
        """Lock what is open until it is closed. False where another has locked it; some disks know no locks."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def is_at(descriptor: int, path: Path) -> bool:
        """Whether what is open still has this name: it may have been deleted before it was locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError:
            return False
