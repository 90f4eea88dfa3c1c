"""Rewards of CLIP dual encoders (arXiv 2103.00020).

CLIP score, PickScore v1 (arXiv 2305.01569), HPS v2 and v2.1 (arXiv 2306.09341).
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import quoted
from .base import PromptMemory, Reward, RewardError, at_least_float32, warn_of_truncated_text
from .clip_checkpoint import (
    build,
    has_image_tower,
    has_transformers_layout,
    image_embedding,
    image_part,
    prepare,
    text_embedding,
    text_part,
    uses_quick_gelu,
)
from .files import LoadOptions, Weights, find, read
from .image import center_crop, constant, fit_square, resize_shortest_side
from .published import CLIPS

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_H14_WIDTH = 1280


@dataclass(frozen=True)
class ClipKind:
    """How a dual encoder is used as a reward."""

    cosine_mean: float
    """Typical cosine of a picture and its prompt."""
    cosine_std: float
    """Typical standard deviation of the cosine."""
    scaled: bool = True
    """Whether the score is the cosine times exp(logit_scale)."""
    whole: bool = False
    """Whether the picture is padded to a square with black bars, instead of cropped at its centre."""
    rounded: Callable[[float], int] = round
    """Rounding of the crop's position."""


CLIP_KINDS = {
    "CLIP score": ClipKind(0.25, 0.03),
    "PickScore": ClipKind(0.215, 0.013, rounded=math.floor),
    "HPS v2": ClipKind(0.275, 0.0075, scaled=False, whole=True),
    "HPS v2.1": ClipKind(0.285, 0.03, scaled=False, whole=True),
}
"""Sources of the means: CLIP scores of pictures with their own prompts are reported as 25 to 35; PickScore has 21.5 on
Pick-a-Pic v2, at a scale of 100; for HPS they are those of Stable Diffusion 1.4 and later in its authors' benchmarks.
The standard deviations are assumed. Over all models of those benchmarks, HPS v2 has a fourth of the spread of v2.1."""


@functools.cache
def tokenizer() -> Any:
    """CLIP's tokenizer, whose vocabulary ships with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def preprocess(pixels: Tensor, image_size: int, whole: bool = False, rounded: Callable[[float], int] = round) -> Tensor:
    """Pixels (B,3,H,W) in [0,1] -> normalised (B,3,S,S): CLIP's resize and centre crop, or HPS's padding (whole).

    The difference to PIL is less than half of one of 255 levels on average for photographs. PIL rounds, and clips
    bicubic overshoot at edges, which would have no gradient.
    """
    square = (
        fit_square(pixels, image_size)
        if whole
        else center_crop(resize_shortest_side(pixels, image_size), image_size, rounded)
    )
    return (square - constant(_MEAN, square).view(3, 1, 1)) / constant(_STD, square).view(3, 1, 1)


def embed(
    tower: Any, pixels: Tensor, image_size: int, whole: bool = False, rounded: Callable[[float], int] = round
) -> Tensor:
    """Pixels (B,3,H,W) -> unit vectors (B,E) in float32, with a tower of any precision."""
    prepared = preprocess(at_least_float32(pixels), image_size, whole, rounded)
    return F.normalize(at_least_float32(tower(prepared.to(tower.conv1.weight.dtype))), dim=1)


class ClipReward(Reward):
    """A multiple of cosine(picture, prompt). The towers may be bfloat16 or float16; the rest is float32."""

    name = "CLIP"
    needs_prompt = True
    model: Any

    def __init__(self, model: Any, kind: ClipKind = CLIP_KINDS["CLIP score"]):
        """model: open_clip.CLIP with weights. Raises RewardError if its logit_scale is damaged."""
        super().__init__()
        self.model = model
        self.kind = kind
        self.scale = model.logit_scale.detach().float().exp().item() if kind.scaled else 1.0
        if not 0 < self.scale < math.inf:
            raise RewardError("its logit_scale is damaged; download it again.")
        self.reference_mean = self.scale * kind.cosine_mean
        self.reference_std = self.scale * kind.cosine_std
        self.activation_bytes = vit_activation_bytes(model.visual)
        self._text_features = PromptMemory[tuple[torch.dtype, str], Tensor]()

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = self.image_features(pixels)
        return self.scale * (pictures * self.text_features(prompts).to(pictures, non_blocking=True)).sum(1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B,3,H,W) -> unit vectors (B,E)."""
        return embed(self.model.visual, pixels, self.model.visual.image_size[0], self.kind.whole, self.kind.rounded)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B,E) on the CPU, cached per prompt and precision of the model."""
        precision = self.model.token_embedding.weight.dtype
        return torch.stack(self._text_features([(precision, prompt) for prompt in prompts], self._encode))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, keys: list[tuple[torch.dtype, str]]) -> Tensor:
        # Outside inference mode, because a later backward pass reads the features.
        prompts = [prompt for _, prompt in keys]
        warn_of_truncated_text(self, prompts)
        tokens = tokenizer()(prompts, self.model.context_length).to(self.model.token_embedding.weight.device)
        return F.normalize(at_least_float32(self.model.encode_text(tokens)), dim=1).cpu()

    def truncated_text(self, prompt: str) -> str:
        return tokenizer().decode(tokenizer().encode(prompt)[self.model.context_length - 2 :]).strip()


def vit_activation_bytes(tower: Any) -> int:
    """Memory per picture of open_clip's VisionTransformer with a graph."""
    tokens, width = tower.positional_embedding.shape
    return tower.transformer.layers * layer_activation_bytes(tokens, width, tower.conv1.weight.element_size())


def layer_activation_bytes(tokens: int, width: int, element_size: int) -> int:
    """Memory of a frozen transformer layer: 10 numbers per token and channel for the backward pass, 2 temporary
    ones."""
    return 12 * tokens * width * element_size


def load_clip(weights: Weights, options: LoadOptions) -> ClipReward:
    """The reward of a dual encoder in one file."""
    kind, quick_gelu = recognise_kind(weights, options.kind), uses_quick_gelu(weights)
    reward = ClipReward(build(prepare(weights.state, options.precision), weights.hints, quick_gelu), CLIP_KINDS[kind])
    reward.description = f"{kind}, with {'QuickGELU' if quick_gelu else 'GELU'}"
    return reward


def recognise_kind(weights: Weights, wanted: str | None = None) -> str:
    """Which of CLIP_KINDS a dual encoder is. Raises RewardError if `wanted`, or the metadata, names none.

    Shapes cannot decide, because PickScore, HPS and LAION's CLIP are all a ViT-H/14. In order of precedence:

    1. `wanted`, then the metadata entry `kind`.
    2. The name of the file or its folder contains "hps", or the file is packed as HPS is published: a ViT-H/14 under
       `state_dict` without an optimizer. LAION's CLIP has no `state_dict` key.
    3. The name contains "pickscore", or the file is a ViT-H/14 in transformers' layout without "clip" in its name.
    4. Otherwise it is a CLIP score.
    """
    if stated := wanted or weights.hints.get("kind"):
        if stated not in CLIP_KINDS:
            raise RewardError(
                f"there is no kind of CLIP reward called {quoted(stated)}; choose one of {', '.join(CLIP_KINDS)}."
            )
        return stated
    name = weights.name.lower()
    patches = weights.state.get(
        "visual.conv1.weight", weights.state.get("vision_model.embeddings.patch_embedding.weight")
    )
    huge = patches is not None and patches.shape[0] == _H14_WIDTH
    if "hps" in name or (huge and "state_dict" in weights.wrapper and "optimizer" not in weights.wrapper):
        return "HPS v2" if "hps" in name and not re.search(r"2[._-]?1", name) else "HPS v2.1"
    if "pickscore" in name or (huge and has_transformers_layout(weights.state) and "clip" not in name):
        return "PickScore"
    return "CLIP score"


def load_clip_of_towers(weights: Weights, options: LoadOptions) -> ClipReward:
    """The reward of an image tower and a text tower, which is given or found by the width of its embedding."""
    width = image_embedding(weights.shapes)
    if width is None:
        raise RewardError(
            "its image tower has no projection, so that no text can be compared with what it sees; use a CLIP's."
        )
    file = options.text_tower or find(
        [weights.path.parent, *options.text_folders],
        lambda _, shapes: text_embedding(shapes) == width and not has_image_tower(shapes),
    )
    whole = "a whole CLIP" + (f", such as {CLIPS[width]}" if width in CLIPS else "")
    if file is None:
        folder = options.text_folders[0] if options.text_folders else weights.path.parent
        raise RewardError(
            f"it is an image tower alone; put a text tower with a text_projection to {width} into {folder}, "
            f"or use {whole}."
        )
    text = read(file)
    if (found := text_embedding(text.shapes)) != width:
        ends = f"a text_projection to {found}" if found else "no text_projection"
        raise RewardError(
            f"the text tower {file.name} has {ends}, but the image tower ends in {width} numbers; use {whole}."
        )
    scale = weights.state.get("logit_scale", torch.tensor(math.log(100)))
    state = image_part(weights.state) | text_part(text.state) | {"logit_scale": scale}
    reward = load_clip(Weights(weights.path, state, {**text.hints, **weights.hints}), options)
    reward.description += f", prompts read by {file.name}"
    reward.files = text.files
    return reward
