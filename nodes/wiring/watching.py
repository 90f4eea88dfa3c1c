"""Whether files are still what they were when a node read them."""

from collections.abc import Iterable
from pathlib import Path

Identity = tuple[int, ...] | None


def identity(file: Path) -> Identity:
    """Another one once a file was written anew or replaced, even by one of the same size and time; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class ReadFiles:
    """The files that the nodes of a kind have read, for their `fingerprint_inputs`: it is known only afterwards which they were, such as those
    that were searched for, or whose name came from another node."""

    def __init__(self) -> None:
        self.known: dict[Path, Identity] = {}
        self.changes = 0

    def remember(self, files: Iterable[Path]) -> None:
        self.known |= {file: identity(file) for file in files}

    def fingerprint(self) -> int:
        """How often one of them was found changed."""
        now = {file: identity(file) for file in self.known}
        self.changes += now != self.known
        self.known = now
        return self.changes
