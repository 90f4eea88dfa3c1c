"""Detects that files have changed since a node read them."""

from collections.abc import Iterable
from pathlib import Path

Identity = tuple[int, ...] | None


def identity(file: Path) -> Identity:
    """A value that changes when the file is rewritten or replaced, even with the same size and time.

    None: no such file.
    """
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class ReadFiles:
    """The files that the nodes of one class have read, for `fingerprint_inputs`.

    Which files a node reads is known only after it ran: it may search for them, or get the name from another node.
    """

    def __init__(self) -> None:
        self.known: dict[Path, Identity] = {}
        self.changes = 0

    def remember(self, files: Iterable[Path]) -> None:
        self.known |= {file: identity(file) for file in files}

    def fingerprint(self) -> int:
        """A counter that increases whenever a file has changed since the last call."""
        now = {file: identity(file) for file in self.known}
        self.changes += now != self.known
        self.known = now
        return self.changes
