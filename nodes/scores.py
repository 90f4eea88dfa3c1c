"""The node that scores pictures, for people and for files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..guidance.rewards import CombinedReward, Reward
from .rewards import CATEGORY
from .wiring.captions import Line, caption
from .wiring.inputs import REWARD
from .wiring.loaded import LoadedReward
from .wiring.metadata import downstream_inputs, note
from .wiring.node import prepares_inputs
from .wiring.scoring import remarks, score_parts, to_pixels

PICTURES, ANNOTATED = 3, 4
"""Outputs of Score Images."""


@dataclass(frozen=True)
class Column:
    """One reward's scores of every picture of a batch."""

    reward: str
    scores: list[float]
    standardized: list[float]
    combined: bool
    """A combination's scores are in units of spread already."""

    def cell(self, picture: int) -> str:
        standardized = f"{self.standardized[picture]:+.2f}"
        return standardized if self.combined else f"{self.scores[picture]:.4f} ({standardized})"


@prepares_inputs
class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores every picture of a batch by a reward, and by each part of a combination.",
            search_aliases=["rate images", "reward score", "aesthetic score"],
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures; each gets its own score."),
                REWARD.Input("reward", tooltip="What to score by. Of a combination, the report shows every part."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt of the pictures, for rewards that compare with one.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="Raw scores, one for each picture."
                ),
                io.Float.Output(
                    display_name="standardized",
                    is_output_list=True,
                    tooltip="Scores in units of the reward's typical spread.",
                ),
                io.String.Output(display_name="report", tooltip="The scores as a table."),
                io.Image.Output(
                    display_name="images",
                    tooltip="The same pictures. Save these, and the scores are written into the PNG files as well, as 'reward_guidance'. "
                    "The help page says how the name of a file tells which of them is its own.",
                ),
                io.Image.Output(display_name="annotated", tooltip="The pictures with their scores written below."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor, reward: LoadedReward, prompt: str) -> io.NodeOutput:
        parts = score_parts(images, reward, prompt)
        columns = [column(part, scores) for part, scores in parts]
        text = "\n\n".join([table(columns), *remarks(prompt, reward)])
        note(cls.hidden, record(columns, prompt))
        annotated = caption(to_pixels(images).movedim(1, -1), captions(columns, len(images)))
        total = columns[0]
        return io.NodeOutput(total.scores, total.standardized, text, images, annotated, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return downstream_inputs(cls.hidden, (PICTURES, ANNOTATED))


def column(reward: Reward, scores: Tensor) -> Column:
    return Column(reward.name, scores.tolist(), reward.standardize(scores).tolist(), isinstance(reward, CombinedReward))


def table(columns: Sequence[Column]) -> str:
    """Markdown that is also readable as it stands."""
    pictures = range(len(columns[0].scores))
    cells = [["picture", *(str(i + 1) for i in pictures)]]
    cells += [[one.reward.replace("|", "/"), *(one.cell(i) for i in pictures)] for one in columns]
    widths = [max(map(len, entries)) for entries in cells]
    rows = [[entry.rjust(width) for entry, width in zip(row, widths, strict=True)] for row in zip(*cells, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def captions(columns: Sequence[Column], pictures: int) -> list[list[Line]]:
    return [
        [Line(f"{i + 1} · {one.reward}" if one is columns[0] else one.reward, one.cell(i)) for one in columns]
        for i in range(pictures)
    ]


def record(columns: Sequence[Column], prompt: str) -> dict:
    """For PNG files. The pictures of a batch share it."""
    total, *parts = ({key: value for key, value in asdict(one).items() if key != "combined"} for one in columns)
    return {**total, "prompt": prompt, "parts": parts}


NODES = [ScoreImages]
