"""The scores of a batch as a table, as captions below the images, and as an entry in PNG files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ...guidance.rewards import CombinedReward, Reward
from .captions import Line


@dataclass(frozen=True)
class Column:
    """One reward's scores of all images of a batch."""

    reward: str
    scores: list[float]
    standardized: list[float]
    combined: bool
    """Whether the reward is a combination, whose scores are standardized already."""

    def cell(self, image: int) -> str:
        standardized = f"{self.standardized[image]:+.2f}"
        return standardized if self.combined else f"{self.scores[image]:.4f} ({standardized})"


def column(reward: Reward, scores: Tensor) -> Column:
    """scores: raw, (B,)."""
    return Column(reward.name, scores.tolist(), reward.standardize(scores).tolist(), isinstance(reward, CombinedReward))


def table(columns: Sequence[Column]) -> str:
    """A Markdown table with aligned columns, one line an image."""
    images = range(len(columns[0].scores))
    cells = [["picture", *(str(i + 1) for i in images)]]
    cells += [[column.reward.replace("|", "/"), *(column.cell(i) for i in images)] for column in columns]
    widths = [max(map(len, entries)) for entries in cells]
    lines = [
        [entry.rjust(width) for entry, width in zip(line, widths, strict=True)] for line in zip(*cells, strict=True)
    ]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def captions(columns: Sequence[Column]) -> list[list[Line]]:
    """For each image, a line a reward; the first line also has the number of the image."""
    return [
        [
            Line(f"{i + 1} · {column.reward}" if column is columns[0] else column.reward, column.cell(i))
            for column in columns
        ]
        for i in range(len(columns[0].scores))
    ]


def png_entry(columns: Sequence[Column], prompt: str) -> dict:
    """The scores as JSON values, for the PNG files of the whole batch."""
    total, *parts = ({key: value for key, value in asdict(column).items() if key != "combined"} for column in columns)
    return {**total, "prompt": prompt, "parts": parts}
