"""CLIP dual encoders (arXiv 2103.00020) as rewards. PickScore v1 (arXiv 2305.01569) is one of them."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Reward, at_least_float32
from .clip_checkpoint import Hints, StateDict, clip_model, has_transformers_layout
from .image import center_crop, resize_shortest_side

log = logging.getLogger(__name__)

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CACHED_PROMPTS = 256

# Mean and spread of the cosine. PickScore: 21.5 on Pick-a-Pic v2 at a scale of 100, its spread assumed to be 1.3. CLIP: pictures
# with their own prompts are reported at 25 to 35; a mean of 25 and a spread of 3 are assumed.
_PICKSCORE_COSINE = (0.215, 0.013)
_CLIP_COSINE = (0.25, 0.03)


@functools.cache
def tokenizer() -> Any:
    """CLIP's own, whose vocabulary ships with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def preprocess(pixels: Tensor, image_size: int) -> Tensor:
    """Pixels (B,3,H,W) in [0,1] -> (B,3,S,S), normalised: CLIP's resize and centre crop, on tensors.

    Against the same steps in PIL, photographs differ by less than half of one of 255 levels on average (PIL rounds, and clips bicubic
    overshoot at edges, which has no gradient).
    """
    cropped = center_crop(resize_shortest_side(pixels, image_size), image_size)
    return (cropped - cropped.new_tensor(_MEAN).view(3, 1, 1)) / cropped.new_tensor(_STD).view(3, 1, 1)


class ClipReward(Reward):
    """exp(logit_scale) * cosine(picture, prompt). The towers may be bfloat16 or float16; what follows them is float32."""

    name = "CLIP"
    needs_prompt = True
    model: Any

    def __init__(self, model: Any, image_size: int, cosine_mean: float = _CLIP_COSINE[0], cosine_std: float = _CLIP_COSINE[1]):
        """model: open_clip.CLIP with weights."""
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.scale = model.logit_scale.detach().float().exp().item()
        self.reference_mean = self.scale * cosine_mean
        self.reference_std = self.scale * cosine_std
        self.activation_bytes = _activation_bytes(model.visual)
        self._text_features: dict[str, Tensor] = {}

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = self.image_features(pixels)
        return self.scale * (pictures * self.text_features(prompts).to(pictures)).sum(1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B,3,H,W) -> unit vectors (B,E)."""
        prepared = preprocess(at_least_float32(pixels), self.image_size)
        features = self.model.encode_image(prepared.to(self.model.visual.conv1.weight.dtype))
        return F.normalize(at_least_float32(features), dim=1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B,E) on the CPU, where the cache survives the model's moves between devices."""
        if len(self._text_features) > _CACHED_PROMPTS:
            self._text_features.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        if new:
            self._text_features |= zip(new, self._encode(new), strict=True)
        return torch.stack([self._text_features[prompt] for prompt in prompts])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        # Outside inference mode, since a later backward pass reads the cached features.
        for prompt in prompts:
            if unread := self.unread(prompt):
                log.warning("%s reads %d tokens of a prompt and does not see its end: %s", self.name, self.model.context_length, unread)
        tokens = tokenizer()(prompts, self.model.context_length).to(self.model.token_embedding.weight.device)
        return F.normalize(at_least_float32(self.model.encode_text(tokens)), dim=1).cpu()

    def unread(self, prompt: str) -> str:
        """The end of a prompt that does not fit the text tower's context; empty for most."""
        return tokenizer().decode(tokenizer().encode(prompt)[self.model.context_length - 2 :]).strip()


def _activation_bytes(tower: Any) -> int:
    """Per picture: a transformer layer keeps about 17 numbers per token and channel for its backward pass (arXiv 2205.05198)."""
    tokens, width = tower.positional_embedding.shape
    return 17 * tokens * width * tower.transformer.layers * max(tower.conv1.weight.element_size(), 2)


def load_clip(state: StateDict, hints: Hints) -> ClipReward:
    """A ViT-H/14 in transformers' layout is taken for PickScore, the one used as a reward; metadata overrides its reference values."""
    model, architecture = clip_model(state, hints)
    pickscore = has_transformers_layout(state) and architecture.vision_width == 1280
    return ClipReward(model, architecture.image_size, *(_PICKSCORE_COSINE if pickscore else _CLIP_COSINE))
