"""CLIP checkpoints -> open_clip's module. The architecture is inferred from the shapes of the weights.

Two layouts are read, that of open_clip and OpenAI, and that of transformers' CLIPModel, with both towers or one. Two
properties cannot be inferred from shapes:

- Attention heads. Published ViTs have heads 64 wide, but at most 16 in the image tower. Those of H, g and bigG are 80,
  88 and 104 wide.
- The activation. OpenAI trained with QuickGELU, LAION with GELU. OpenAI's archives have an `input_resolution` entry.
  For other files the name of the file or its folder decides, if it contains openai, laion or quickgelu. Otherwise
  files in transformers' layout count as OpenAI's up to the size of L/14, the largest that OpenAI published.

Hints override both rules: vision_heads, text_heads and quick_gelu in the safetensors metadata, or a folder's
config.json.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import short
from .base import RewardError
from .files import Hints, Shapes, StateDict, Weights

_TRANSFORMERS_KEYS = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_TRANSPOSED = (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))
_IMAGE_PREFIXES = ("visual.", "vision_model.", "visual_projection.")
_TEXT_PREFIXES = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_model.",
    "text_projection",
)
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_OPENAI_WIDTH = 1024
"""Width of the image tower of L/14, the widest ViT that OpenAI published."""
_WORDS = {"quickgelu": True, "openai": True, "laion": False}
"""Words in a file name, and whether they mean QuickGELU, as in OpenAI's own weights and some of LAION's."""
_UNSUPPORTED = {
    "visual.layer1.": "a CLIP with a ResNet for its image tower",
    "visual.trunk.": "a CLIP with an image tower of timm's",
    "text_decoder.": "a CoCa",
    "text.": "a CLIP with a text tower of another make",
    "vision_model.head.": "a SigLIP",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VOCABULARY = 49408
_LARGEST, _LONGEST = 2048, 1024
"""Largest supported numbers of pixels a side and of tokens, several times those of published models (560 and 248). They
limit the memory that a damaged file can cost."""


@dataclass(frozen=True)
class VisionArchitecture:
    """The sizes of an image tower. Raises RewardError if they are impossible."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        check_heads("vision", self.width, self.heads)


@dataclass(frozen=True)
class TextArchitecture:
    """The sizes of a text tower. Raises RewardError if they are impossible or not supported."""

    context_length: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        if self.vocabulary != _VOCABULARY:
            raise RewardError(
                f"the vocabulary has {self.vocabulary} tokens; only CLIP's own, of {_VOCABULARY}, is supported."
            )
        if self.context_length > _LONGEST:
            raise RewardError(f"the text tower reads {self.context_length} tokens; at most {_LONGEST} are supported.")
        check_heads("text", self.width, self.heads)


def check_image_size(pixels: int) -> None:
    """Raise RewardError if an image size is not supported."""
    if not 0 < pixels <= _LARGEST:
        raise RewardError(f"the image tower sees pictures of {pixels} pixels a side; 1 to {_LARGEST} are supported.")


def check_heads(tower: str, width: int, heads: int) -> None:
    """Raise RewardError if the width is not a multiple of the number of heads."""
    if heads < 1 or width % heads:
        raise RewardError(
            f"a {tower} tower {width} wide cannot have {short(heads)} heads; "
            f"state {tower}_heads in the file's metadata."
        )


def check_floats(state: StateDict) -> None:
    """Raise RewardError if a tensor is sparse, or not of a supported floating point type."""
    if sparse := next((key for key, tensor in state.items() if tensor.layout != torch.strided), None):
        raise RewardError(f"{short(sparse)} is stored as a sparse tensor; save it as a dense one.")
    if unreadable := {tensor.dtype for tensor in state.values()}.difference(_FLOATS):
        raise RewardError(
            f"the weights are stored as {', '.join(map(str, unreadable))}; save them as float16, bfloat16 or float32."
        )


def has_image_tower(keys: Iterable[str]) -> bool:
    return "visual.conv1.weight" in keys or "vision_model.embeddings.patch_embedding.weight" in keys


def has_text_tower(keys: Iterable[str]) -> bool:
    return "token_embedding.weight" in keys or "text_model.embeddings.token_embedding.weight" in keys


def unsupported(keys: Iterable[str]) -> str | None:
    """The kind of a model that resembles a CLIP but is not supported, for a message. None for all others."""
    return next((kind for prefix, kind in _UNSUPPORTED.items() if any(key.startswith(prefix) for key in keys)), None)


def has_transformers_layout(keys: Iterable[str]) -> bool:
    return any(key.startswith(("vision_model.", "text_model.")) for key in keys)


def image_embedding(shapes: Shapes) -> int | None:
    """Width of an image tower's embedding. None if there is no image tower."""
    return _columns(shapes, "visual.proj", "visual_projection.weight") if has_image_tower(shapes) else None


def text_embedding(shapes: Shapes) -> int | None:
    """Width of a text tower's embedding. None if there is no text tower, or no projection after it."""
    return _columns(shapes, "text_projection", "text_projection.weight") if has_text_tower(shapes) else None


def _columns(shapes: Shapes, projection: str, transposed: str) -> int | None:
    for name, axis in ((projection, 1), (transposed, 0)):
        if len(shapes.get(name, ())) == 2:
            return shapes[name][axis]
    return None


def is_openai(file: Path, shapes: Shapes) -> bool:
    """Whether the weights count as OpenAI's (see the module's docstring)."""
    if "input_resolution" in shapes:
        return True
    name = f"{file.parent.name}/{file.name}".lower()
    for word, theirs in _WORDS.items():
        if word in name:
            return theirs
    width, *_ = shapes.get("vision_model.embeddings.patch_embedding.weight") or (math.inf,)
    return width <= _OPENAI_WIDTH


def uses_quick_gelu(weights: Weights) -> bool:
    """Whether the activation is QuickGELU (see the module's docstring)."""
    return weights.hints.get("quick_gelu", str(is_openai(weights.path, weights.shapes))).lower() == "true"


def image_part(state: StateDict) -> StateDict:
    return {key: tensor for key, tensor in state.items() if key.startswith(_IMAGE_PREFIXES)}


def text_part(state: StateDict) -> StateDict:
    return {key: tensor for key, tensor in state.items() if key.startswith(_TEXT_PREFIXES)}


def to_open_clip_layout(state: StateDict) -> StateDict:
    """Renames keys, stacks the query, key and value projections, and transposes the two final projections."""
    state = {key: tensor for key, tensor in state.items() if not key.endswith("position_ids")}
    for query in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[query.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    for linear, matrix in _TRANSPOSED:
        if linear in state:
            state[matrix] = state.pop(linear).t().contiguous()
    return {_open_clip_key(key): tensor for key, tensor in state.items()}


def _open_clip_key(key: str) -> str:
    for pattern, replacement in _TRANSFORMERS_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


def infer_vision(state: StateDict, hints: Hints) -> VisionArchitecture:
    """The architecture of a state dict in open_clip's layout."""
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    patches, _ = state["visual.positional_embedding"].shape
    return VisionArchitecture(
        image_size=patch_size * math.isqrt(patches - 1),
        patch_size=patch_size,
        width=width,
        layers=_count_layers(state, "visual.transformer"),
        heads=int(hints.get("vision_heads", max(1, min(16, width // 64)))),
        mlp=len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
    )


def infer_text(state: StateDict, hints: Hints) -> TextArchitecture:
    """The architecture of a state dict in open_clip's layout."""
    vocabulary, width = state["token_embedding.weight"].shape
    return TextArchitecture(
        context_length=len(state["positional_embedding"]),
        vocabulary=vocabulary,
        width=width,
        layers=_count_layers(state, "transformer"),
        heads=int(hints.get("text_heads", max(1, width // 64))),
        mlp=len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
    )


def _count_layers(state: StateDict, tower: str) -> int:
    return sum(key.startswith(f"{tower}.resblocks.") and key.endswith(".ln_1.weight") for key in state)


def build(state: StateDict, hints: Hints, quick_gelu: bool) -> nn.Module:
    """open_clip.CLIP with the tensors of a state dict in open_clip's layout. They are not copied."""
    text = infer_text(state, hints)
    model = _on_meta(state, infer_vision(state, hints), text, quick_gelu)
    model.load_state_dict(state, assign=True)
    model.attn_mask = torch.full((text.context_length, text.context_length), -torch.inf).triu_(1)
    return model.eval().requires_grad_(False)


def build_image_tower(state: StateDict, hints: Hints, quick_gelu: bool) -> nn.Module:
    """open_clip.transformer.VisionTransformer with the tensors of an image tower. They are not copied."""
    tower = _on_meta(state, infer_vision(state, hints), None, quick_gelu).visual
    tower.load_state_dict({key.removeprefix("visual."): tensor for key, tensor in state.items()}, assign=True)
    return tower.eval().requires_grad_(False)


def _on_meta(state: StateDict, vision: VisionArchitecture, text: TextArchitecture | None, quick_gelu: bool) -> Any:
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise RewardError(
            "CLIP rewards need the package open_clip_torch; install it with: pip install open_clip_torch"
        ) from error
    # The half keeps int(width * ratio), the width of the MLP, from rounding down.
    vision_cfg = CLIPVisionCfg(
        layers=vision.layers,
        width=vision.width,
        head_width=vision.width // vision.heads,
        mlp_ratio=(vision.mlp + 0.5) / vision.width,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
    )
    text_cfg = CLIPTextCfg()
    if text is not None:
        text_cfg = CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocabulary,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=(text.mlp + 0.5) / text.width,
        )
    with torch.device("meta"):
        return CLIP(state["visual.proj"].shape[1], vision_cfg, text_cfg, quick_gelu=quick_gelu)


def prepare(state: StateDict, precision: Callable[[torch.dtype], torch.dtype]) -> StateDict:
    """A state dict in either layout -> open_clip's layout, in one precision chosen by that of the image tower."""
    state = {key: tensor for key, tensor in state.items() if key not in _OPENAI_SIZES}
    if has_transformers_layout(state):
        state = to_open_clip_layout(state)
    check_floats(state)
    dtype = precision(state["visual.conv1.weight"].dtype)
    return {key: tensor.to(dtype) for key, tensor in state.items()}
