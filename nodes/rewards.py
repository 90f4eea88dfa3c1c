"""Nodes that make, combine and read rewards."""

import os
import re

import comfy.model_management
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..guidance.errors import GuidanceError
from ..guidance.rewards import (
    LIKENESSES,
    STATISTICS,
    ClipImageSimilarity,
    ClipReward,
    ColourReward,
    CombinedReward,
    ImageSimilarity,
    ImageStatistic,
    evaluate,
    load_reward,
)
from .runtime import LoadedReward, manage_reward, normal_weights

REWARD = io.Custom("REWARD")
FOLDER = "reward_models"
CATEGORY = "reward guidance/rewards"


def register_folder() -> None:
    """models/reward_models, beside whatever extra_model_paths.yaml names."""
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([*paths, own])), extensions or folder_paths.supported_pt_extensions)


class LoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadReward",
            display_name="Load Reward Model",
            category=CATEGORY,
            description="Loads a reward from models/reward_models: PickScore or any CLIP. The architecture is read off the file.",
            search_aliases=["PickScore", "CLIP score", "preference model", "scorer"],
            inputs=[
                io.Combo.Input(
                    "reward_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/reward_models, for example PickScore_v1's model.safetensors.",
                )
            ],
            outputs=[REWARD.Output(display_name="reward", tooltip="How well a picture fits: for scoring and for guidance.")],
        )

    @classmethod
    def execute(cls, reward_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, reward_name)
        return io.NodeOutput(manage_reward(load_reward(path)))

    @classmethod
    def fingerprint_inputs(cls, reward_name: str) -> float:
        return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, reward_name))


class ImageStatisticReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceImageStatistic",
            display_name="Image Statistic Reward",
            category=CATEGORY,
            description="Rewards a measurable property of the picture. Needs no weights.",
            search_aliases=["colour", "color", "brightness", "contrast", "saturation", "sharpness"],
            inputs=[
                io.Combo.Input(
                    "statistic",
                    options=["colour", "colour of every pixel", *STATISTICS],
                    tooltip="What to raise. 'colour' pulls the mean colour toward the target and leaves the composition free.",
                ),
                io.Color.Input("colour", default="#3366cc", tooltip="The target of the two colour statistics; the others ignore it."),
                io.Boolean.Input(
                    "lower", default=False, tooltip="Lower the statistic instead: darker, flatter, greyer, softer, another colour."
                ),
            ],
            outputs=[REWARD.Output(display_name="reward")],
        )

    @classmethod
    def execute(cls, statistic: str, colour: str, lower: bool) -> io.NodeOutput:
        reward = ImageStatistic(statistic) if statistic in STATISTICS else ColourReward(_rgb(colour), statistic == "colour of every pixel")
        return io.NodeOutput(manage_reward(CombinedReward([reward], [-1.0]) if lower else reward))


def _rgb(colour: str) -> tuple[float, float, float]:
    """#rrggbb -> three numbers in [0,1]."""
    if not (digits := re.fullmatch("#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})(?:[0-9a-fA-F]{2})?", colour)):
        raise GuidanceError(f"A colour is written as #rrggbb, not as {colour!r}.")
    red, green, blue = (int(pair, 16) / 255 for pair in digits.groups())
    return red, green, blue


class ImageSimilarityReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceImageSimilarity",
            display_name="Image Similarity Reward",
            category=CATEGORY,
            description="Rewards likeness to a reference picture: in layout and colour, or in meaning if a CLIP reward is connected.",
            search_aliases=["likeness", "reference image", "image prompt"],
            inputs=[
                io.Image.Input("image", tooltip="The reference. Of a batch, the first picture is used."),
                io.Combo.Input(
                    "likeness",
                    options=[*LIKENESSES, "meaning"],
                    tooltip="colour: the same colours in the same places. structure: the same shapes in any colours. "
                    "meaning: the same subject and style, by the connected CLIP.",
                ),
                REWARD.Input("clip_reward", optional=True, tooltip="A CLIP from Load Reward Model; needed for likeness in meaning."),
            ],
            outputs=[REWARD.Output(display_name="reward")],
        )

    @classmethod
    def execute(cls, image: Tensor, likeness: str, clip_reward: LoadedReward | None = None) -> io.NodeOutput:
        with torch.inference_mode(False):
            reference = to_pixels(image[:1]).clone()
            if likeness != "meaning":
                return io.NodeOutput(manage_reward(ImageSimilarity(reference, likeness)))
            if clip_reward is None or not isinstance(clip_reward.reward, ClipReward):
                raise GuidanceError("Likeness in meaning is measured by a CLIP: connect Load Reward Model with a CLIP or PickScore file.")
            return io.NodeOutput(LoadedReward(ClipImageSimilarity(clip_reward.reward, reference), clip_reward.patchers))


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        parts = [
            entry
            for i in range(1, 5)
            for entry in (
                REWARD.Input(f"reward_{i}", optional=i > 1, tooltip="Every reward is first brought to zero mean and unit spread."),
                io.Float.Input(f"weight_{i}", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="Its share. Negative weights punish."),
            )
        ]
        return io.Schema(
            node_id="RewardGuidanceCombineRewards",
            display_name="Combine Rewards",
            category=CATEGORY,
            description="A weighted sum of standardized rewards. Several rewards are harder to fool than one.",
            search_aliases=["ensemble", "weighted reward"],
            inputs=parts,
            outputs=[REWARD.Output(display_name="reward")],
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
        candidates = zip((reward_1, reward_2, reward_3, reward_4), (weight_1, weight_2, weight_3, weight_4), strict=True)
        parts = [(loaded, weight) for loaded, weight in candidates if loaded is not None and weight != 0]
        if not parts:
            raise GuidanceError("Combine Rewards has nothing to combine: every weight is 0.")
        reward = CombinedReward([loaded.reward for loaded, _ in parts], [weight for _, weight in parts])
        return io.NodeOutput(LoadedReward(reward, tuple(dict.fromkeys(p for loaded, _ in parts for p in loaded.patchers))))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores every picture of a batch by a reward.",
            search_aliases=["rate images", "reward score", "aesthetic score"],
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures; each gets its own score."),
                REWARD.Input("reward", tooltip="What to score by."),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="The prompt of the pictures, for rewards that compare with one."
                ),
            ],
            outputs=[
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="Raw scores, one for each picture."),
                io.Float.Output(
                    display_name="standardized", is_output_list=True, tooltip="Scores in units of the reward's typical spread."
                ),
                io.String.Output(display_name="report", tooltip="The scores as readable lines."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor, reward: LoadedReward, prompt: str) -> io.NodeOutput:
        raw = score_images(images, reward, prompt)
        standardized = reward.reward.standardize(raw)
        lines = [f"{i}: {score:.4f} ({z:+.2f})" for i, (score, z) in enumerate(zip(raw.tolist(), standardized.tolist(), strict=True))]
        report = f"{reward.reward.name}\n" + "\n".join(lines)
        return io.NodeOutput(raw.tolist(), standardized.tolist(), report, ui=ui.PreviewText(report))


def to_pixels(images: Tensor) -> Tensor:
    """ComfyUI's IMAGE (B,H,W,3 or more channels) -> (B,3,H,W)."""
    return images[..., :3].movedim(-1, 1)


def score_images(images: Tensor, loaded: LoadedReward, prompt: str, chunk: int = 8) -> Tensor:
    """Raw scores (B,) on the CPU, a few pictures at a time."""
    if len(images) == 0:
        raise GuidanceError("There is no picture to score: the batch is empty.")
    comfy.model_management.load_models_gpu(list(loaded.patchers), memory_required=chunk * loaded.reward.activation_bytes)
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False), torch.no_grad(), normal_weights(loaded.reward):
        parts = [evaluate(loaded.reward, pixels.to(device), [prompt]).cpu() for pixels in to_pixels(images).clone().split(chunk)]
    return torch.cat(parts)


NODES = [LoadReward, ImageStatisticReward, ImageSimilarityReward, CombineRewards, ScoreImages]
