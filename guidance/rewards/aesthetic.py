"""LAION's aesthetic predictor v2, a head on OpenAI's CLIP ViT-L/14.

Source: github.com/christophschuhmann/improved-aesthetic-predictor
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import Reward, RewardError
from .clip import embed, vit_activation_bytes
from .clip_checkpoint import build_image_tower, check_floats, image_embedding, image_part, is_openai, prepare
from .files import LoadOptions, Shapes, StateDict, Weights, find, read
from .published import CLIPS

_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers; the others are dropouts."""
_POSITIONS = 257
"""Position embeddings of L/14 at 224 pixels. OpenAI's L/14 for 336 pixels has another embedding space."""


class AestheticReward(Reward):
    """How pleasing people find a picture, from 1 to 10, independent of the prompt. The head is float32."""

    name = "LAION aesthetic"
    reference_mean = 5.85
    reference_std = 0.6
    """Typical of pictures of diffusion models. The standard deviation is assumed."""
    tower: Any

    def __init__(self, tower: Any, weight: Tensor, bias: Tensor):
        """tower: open_clip's VisionTransformer. weight (E,), bias (): the affine head on its unit vectors."""
        super().__init__()
        self.tower = tower
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.activation_bytes = vit_activation_bytes(tower)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        features = embed(self.tower, pixels, self.tower.image_size[0])
        return features @ self.weight.to(features) + self.bias.to(features)


def is_aesthetic_head(keys: Shapes | StateDict) -> bool:
    """Whether these are the keys of an aesthetic head."""
    return set(keys) == {f"layers.{i}.{part}" for i in _LAYERS for part in ("weight", "bias")}


def collapse(state: StateDict) -> tuple[Tensor, Tensor]:
    """The linear layers as a single one, weight (E,) and bias (): there are no activations between them.

    Raises RewardError if their shapes do not fit, or the head has more than one output.
    """
    layers = [(state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()) for i in _LAYERS]
    widths = [layers[0][0].shape[-1:], *(bias.shape for _, bias in layers)]
    if any(
        weight.shape != (*after, *before)
        for (weight, _), before, after in zip(layers, widths, widths[1:], strict=False)
    ):
        raise RewardError("the layers of its head do not follow each other; download it again.")
    if widths[-1] != (1,):
        raise RewardError(f"its head ends in {widths[-1].numel()} numbers; a score is one.")
    weight, bias = layers.pop()
    for layer, addition in reversed(layers):
        weight, bias = weight @ layer, weight @ addition + bias
    return weight[0], bias[0]


def load_aesthetic(weights: Weights, options: LoadOptions) -> AestheticReward:
    """The reward of a head and an image tower, which is given or found. Raises RewardError if no tower fits."""
    check_floats(weights.state)
    weight, bias = collapse(weights.state)
    folders = [weights.path.parent, *options.image_folders]
    file = options.image_tower or find(folders, lambda file, shapes: _is_its_tower(file, shapes, len(weight)))
    if file is None:
        raise RewardError(_advice("it needs the image tower", weights.path.parent, options))
    tower = read(file)
    if image_embedding(tower.shapes) != len(weight):
        raise RewardError(
            _advice(
                f"{file.name} has no image tower that ends in {len(weight)} numbers; it needs that",
                file.parent,
                options,
            )
        )
    state = prepare(image_part(tower.state), options.precision)
    reward = AestheticReward(build_image_tower(state, tower.hints, quick_gelu=True), weight, bias)
    reward.description, reward.files = f"LAION aesthetic, with the image tower of {tower.name}", tower.files
    return reward


def _is_its_tower(file: Path, shapes: Shapes, width: int) -> bool:
    positions = (
        shapes.get("visual.positional_embedding")
        or shapes.get("vision_model.embeddings.position_embedding.weight")
        or (0,)
    )
    return image_embedding(shapes) == width and positions[0] == _POSITIONS and is_openai(file, shapes)


def _advice(what: str, folder: Path, options: LoadOptions) -> str:
    folder = options.image_folders[0] if options.image_folders else folder
    return f"{what} of OpenAI's CLIP ViT-L/14; put {CLIPS[768]} into {folder}."
