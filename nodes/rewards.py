"""Nodes that make and combine rewards."""

import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..guidance.errors import GuidanceError
from ..guidance.rewards import (
    CLIP_KINDS,
    LIKENESSES,
    STATISTICS,
    ClipImageSimilarity,
    ClipReward,
    ColourReward,
    CombinedReward,
    ImageSimilarity,
    ImageStatistic,
    LoadOptions,
    load_reward,
)
from .wiring.folders import (
    AUTO,
    IMAGE_TOWERS,
    REWARDS,
    TEXT_TOWERS,
    model_folders,
    reward_names,
    reward_path,
    tower_path,
)
from .wiring.inputs import REWARD, parse_colour
from .wiring.loaded import LoadedReward, combine_rewards, manage_reward
from .wiring.memory import precision
from .wiring.node import prepares_inputs
from .wiring.scoring import to_pixels
from .wiring.watching import ReadFiles

CATEGORY = "reward guidance/rewards"
DTYPES = {AUTO: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_read = ReadFiles()


@prepares_inputs
class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadReward",
            display_name="Load Reward Model",
            category=CATEGORY,
            description="Loads a reward from models/reward_models: PickScore, HPS v2 and v2.1, ImageReward, LAION's "
            "aesthetic score, or any CLIP. The kind is detected from the file.",
            search_aliases=[
                "PickScore",
                "HPS",
                "HPSv2",
                "ImageReward",
                "aesthetic score",
                "CLIP score",
                "preference model",
                "scorer",
            ],
            inputs=[
                io.Combo.Input(
                    "reward_name",
                    options=reward_names(),
                    tooltip="A file in models/reward_models, for example PickScore_v1.safetensors or "
                    "HPS_v2.1_compressed.pt. Or an image tower in models/clip_vision, which gives a CLIP score "
                    "together with a text tower.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=AUTO,
                    tooltip="Precision of the model; the computations after it are fp32. auto: the precision of the "
                    "file, or fp32 if the device is slow at it. fp16 and bf16 halve the memory and change scores a "
                    "little, bf16 more than fp16.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "clip_kind",
                    options=[AUTO, *CLIP_KINDS],
                    default=AUTO,
                    tooltip="The kind of a CLIP reward, which the weights alone do not show. Leave it at auto, unless "
                    "the node shows that a renamed file was detected as the wrong kind.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "image_tower",
                    options=[AUTO, *folder_paths.get_filename_list(IMAGE_TOWERS)],
                    default=AUTO,
                    tooltip="For an aesthetic head only: the file in models/clip_vision with OpenAI's CLIP ViT-L/14. "
                    "auto searches for it.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "text_tower",
                    options=[AUTO, *folder_paths.get_filename_list(TEXT_TOWERS)],
                    default=AUTO,
                    tooltip="For an image tower only: the file in models/text_encoders that was trained with it. auto "
                    "takes the first one that fits.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[REWARD.Output(display_name="reward", tooltip="For guidance, scoring and selection.")],
        )

    @classmethod
    def execute(cls, reward_name: str, dtype: str, clip_kind: str, image_tower: str, text_tower: str) -> io.NodeOutput:
        options = LoadOptions(
            image_folders=model_folders(IMAGE_TOWERS) + model_folders(REWARDS),
            text_folders=model_folders(TEXT_TOWERS),
            image_tower=tower_path(IMAGE_TOWERS, image_tower),
            text_tower=tower_path(TEXT_TOWERS, text_tower),
            kind=None if clip_kind == AUTO else clip_kind,
            precision=precision(DTYPES[dtype]),
        )
        reward = load_reward(reward_path(reward_name), options)
        _read.remember(reward.files)
        return io.NodeOutput(manage_reward(reward), ui=ui.PreviewText(f"used as {reward.description}"))

    @classmethod
    def validate_inputs(cls, reward_name: str | None = "") -> bool | str:
        """Replaces ComfyUI's message about a missing file by one that says where to get the file.

        reward_name: None if it comes from another node, "" or left out if there is no file to choose.
        """
        try:
            return reward_name is None or bool(reward_path(reward_name))
        except GuidanceError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, **choices) -> int:
        return _read.fingerprint()


@prepares_inputs
class ImageStatisticReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceImageStatistic",
            display_name="Image Statistic Reward",
            category=CATEGORY,
            description="Rewards a measurable property of the picture. Needs no model file.",
            search_aliases=["colour", "color", "brightness", "contrast", "saturation", "sharpness"],
            inputs=[
                io.Combo.Input(
                    "statistic",
                    options=["colour", "colour of every pixel", *STATISTICS],
                    tooltip="The statistic to raise. 'colour' moves the mean colour toward the target and leaves the "
                    "composition free.",
                ),
                io.Color.Input(
                    "colour",
                    default="#3366cc",
                    optional=True,
                    tooltip="The target of the two colour statistics; the other statistics ignore it.",
                ),
                io.Boolean.Input(
                    "lower",
                    default=False,
                    optional=True,
                    tooltip="Lower the statistic instead: darker, flatter, greyer, softer, another colour.",
                ),
            ],
            outputs=[REWARD.Output(display_name="reward", tooltip="For guidance, scoring and selection.")],
        )

    @classmethod
    def execute(cls, statistic: str, colour: str, lower: bool) -> io.NodeOutput:
        reward = (
            ImageStatistic(statistic)
            if statistic in STATISTICS
            else ColourReward(parse_colour(colour), statistic == "colour of every pixel")
        )
        return io.NodeOutput(manage_reward(CombinedReward([reward], [-1.0]) if lower else reward))


@prepares_inputs
class ImageSimilarityReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceImageSimilarity",
            display_name="Image Similarity Reward",
            category=CATEGORY,
            description="Rewards likeness to a reference picture: in colour, in structure, or in meaning by a "
            "connected CLIP.",
            search_aliases=["likeness", "reference image", "image prompt"],
            inputs=[
                io.Image.Input("image", tooltip="The reference. The first picture of a batch is used."),
                io.Combo.Input(
                    "likeness",
                    options=[*LIKENESSES, "meaning"],
                    tooltip="colour: the same colours in the same places. structure: the same shapes in any colours. "
                    "meaning: the same subject and style, by the connected CLIP.",
                ),
                REWARD.Input(
                    "clip_reward",
                    optional=True,
                    tooltip="A CLIP from Load Reward Model; needed for likeness in meaning.",
                ),
            ],
            outputs=[REWARD.Output(display_name="reward", tooltip="For guidance, scoring and selection.")],
        )

    @classmethod
    def execute(cls, image: Tensor, likeness: str, clip_reward: LoadedReward | None = None) -> io.NodeOutput:
        with torch.inference_mode(False):
            reference = to_pixels(image[:1]).clone()
            if likeness != "meaning":
                return io.NodeOutput(manage_reward(ImageSimilarity(reference, likeness)))
            if clip_reward is None or not isinstance(clip_reward.reward, ClipReward):
                raise GuidanceError(
                    "Likeness in meaning is measured by a CLIP: connect Load Reward Model with a CLIP or PickScore "
                    "file."
                )
            return io.NodeOutput(LoadedReward(ClipImageSimilarity(clip_reward.reward, reference), clip_reward.patchers))


@prepares_inputs
class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        parts = [
            entry
            for i in range(1, 5)
            for entry in (
                REWARD.Input(
                    f"reward_{i}",
                    optional=i > 1,
                    tooltip="A reward of the sum. It is first standardized to zero mean and unit spread.",
                ),
                io.Float.Input(
                    f"weight_{i}",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="The weight of this reward relative to the other weights. 0.2 to 2. Negative weights "
                    "lower the reward, 0 leaves it out.",
                ),
            )
        ]
        return io.Schema(
            node_id="RewardGuidanceCombineRewards",
            display_name="Combine Rewards",
            category=CATEGORY,
            description="A weighted sum of standardized rewards. Several rewards are harder to fool than one.",
            search_aliases=["ensemble", "weighted reward"],
            inputs=parts,
            outputs=[REWARD.Output(display_name="reward", tooltip="For guidance, scoring and selection.")],
        )

    @classmethod
    def execute(
        cls,
        reward_1: LoadedReward,
        weight_1: float,
        weight_2: float,
        weight_3: float,
        weight_4: float,
        reward_2: LoadedReward | None = None,
        reward_3: LoadedReward | None = None,
        reward_4: LoadedReward | None = None,
    ) -> io.NodeOutput:
        rewards, weights = (reward_1, reward_2, reward_3, reward_4), (weight_1, weight_2, weight_3, weight_4)
        return io.NodeOutput(combine_rewards(rewards, weights))


NODES = [LoadReward, ImageStatisticReward, ImageSimilarityReward, CombineRewards]
