"""Rows of numbers, as markdown tables and as JSON."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import clock

Row = dict[str, Any]


@dataclass
class Report:
    """Tables by their name; written after every row, so that nothing is lost of a run that is stopped."""

    folder: Path
    name: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    printed: str = ""
    """The table that was added to last."""

    def add(self, table: str, row: Row) -> None:
        rows = self.tables.setdefault(table, [])
        if table != self.printed:
            print(f"\n### {table}\n\n{line(row)}\n{line('---' for _ in row)}")
        self.printed = table
        print(line(map(shown, row.values())), flush=True)
        rows.append(row)
        self.write()

    def leave_out(self, what: str) -> None:
        print(f"\nNot measured: {what}.", flush=True)
        self.left_out.append(what)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, "machine": machine(), "tables": self.tables, "left out": self.left_out}
        (self.folder / f"{self.name}.json").write_text(json.dumps(content, indent=1, default=vars) + "\n")


def machine() -> dict[str, str]:
    name = (
        torch.cuda.get_device_name() if clock.GPU else f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def share(part: float) -> str:
    return f"{part:.1%}"
