"""The node that scores images."""

from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from .rewards import CATEGORY
from .wiring.captions import caption
from .wiring.inputs import REWARD
from .wiring.loaded import LoadedReward
from .wiring.metadata import add_entry, downstream_inputs
from .wiring.node import prepares_inputs
from .wiring.score_table import captions, column, png_entry, table
from .wiring.scoring import prompt_remarks, score_parts, to_pixels

IMAGES_OUTPUT, ANNOTATED_OUTPUT = 3, 4


@prepares_inputs
class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores every picture of a batch by a reward, and by each reward of a combination.",
            search_aliases=["rate images", "reward score", "aesthetic score"],
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures; each gets its own score."),
                REWARD.Input(
                    "reward", tooltip="The reward to score by. For a combination, the report shows every reward."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt of the pictures, for rewards that compare the picture with it.",
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
                    tooltip="The same pictures. If you save these, the scores are also written into the PNG files, as "
                    "'reward_guidance'. The help page says how to find the score of a file by its name.",
                ),
                io.Image.Output(display_name="annotated", tooltip="The pictures with their scores below."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor, reward: LoadedReward, prompt: str) -> io.NodeOutput:
        parts = score_parts(images, reward, prompt)
        columns = [column(part, scores) for part, scores in parts]
        text = "\n\n".join([table(columns), *prompt_remarks(prompt, reward)])
        add_entry(cls.hidden, png_entry(columns, prompt))
        annotated = caption(to_pixels(images).movedim(1, -1), captions(columns))
        total = columns[0]
        return io.NodeOutput(total.scores, total.standardized, text, images, annotated, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return downstream_inputs(cls.hidden, (IMAGES_OUTPUT, ANNOTATED_OUTPUT))


NODES = [ScoreImages]
