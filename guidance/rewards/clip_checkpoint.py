"""CLIP checkpoints -> open_clip's module. Nobody chooses an architecture: it is read off the shapes of the weights.

Both published layouts are read, open_clip's (and OpenAI's, which is the same) and transformers' CLIPModel.
Two things leave no trace in a shape:

- Attention heads. All published ViTs have 64 wide heads, but at most 16 of them in the image tower (H, g, bigG: 80, 88 and 104 wide).
- The activation. OpenAI trained with QuickGELU, LAION with GELU; OpenAI's archives are known by their `input_resolution` entry, and in
  transformers' layout the sizes OpenAI published (up to L/14) are taken for theirs.

Hints override both rules: vision_heads, text_heads and quick_gelu in the safetensors metadata, or a folder's config.json.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import RewardError

StateDict = dict[str, Tensor]
Hints = Mapping[str, str]

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
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VOCABULARY = 49408


@dataclass(frozen=True)
class ClipArchitecture:
    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    context_length: int
    vocabulary: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    quick_gelu: bool

    def __post_init__(self) -> None:
        if self.vocabulary != _VOCABULARY:
            raise RewardError(f"The vocabulary has {self.vocabulary} tokens; only CLIP's own, of {_VOCABULARY}, is supported.")
        for tower, width, heads in (("vision", self.vision_width, self.vision_heads), ("text", self.text_width, self.text_heads)):
            if heads < 1 or width % heads:
                raise RewardError(f"A {tower} tower {width} wide cannot have {heads} heads; state {tower}_heads in the file's metadata.")


def has_open_clip_layout(state: StateDict) -> bool:
    return "visual.conv1.weight" in state and "token_embedding.weight" in state


def has_transformers_layout(state: StateDict) -> bool:
    return "vision_model.embeddings.patch_embedding.weight" in state and "text_model.embeddings.token_embedding.weight" in state


def to_open_clip_layout(state: StateDict) -> StateDict:
    """Renames; stacks the query, key and value projections; transposes the two final projections."""
    state = {key: tensor for key, tensor in state.items() if not key.endswith("position_ids")}
    for query in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[query.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    state["visual.proj"] = state.pop("visual_projection.weight").t().contiguous()
    state["text_projection"] = state.pop("text_projection.weight").t().contiguous()
    return {_open_clip_key(key): tensor for key, tensor in state.items()}


def _open_clip_key(key: str) -> str:
    for pattern, replacement in _TRANSFORMERS_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


def infer_architecture(state: StateDict, hints: Hints, quick_gelu: bool) -> ClipArchitecture:
    """From a state dict in open_clip's layout."""
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    patches, _ = state["visual.positional_embedding"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    return ClipArchitecture(
        embed_dim=state["visual.proj"].shape[1],
        image_size=patch_size * math.isqrt(patches - 1),
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=_count_layers(state, "visual.transformer"),
        vision_heads=int(hints.get("vision_heads", max(1, min(16, vision_width // 64)))),
        vision_mlp=len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        context_length=len(state["positional_embedding"]),
        vocabulary=vocabulary,
        text_width=text_width,
        text_layers=_count_layers(state, "transformer"),
        text_heads=int(hints.get("text_heads", max(1, text_width // 64))),
        text_mlp=len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
        quick_gelu=hints.get("quick_gelu", str(quick_gelu)).lower() == "true",
    )


def _count_layers(state: StateDict, tower: str) -> int:
    return sum(key.startswith(f"{tower}.resblocks.") and key.endswith(".ln_1.weight") for key in state)


def build(state: StateDict, architecture: ClipArchitecture) -> nn.Module:
    """open_clip.CLIP on the given tensors themselves; nothing is allocated twice."""
    try:
        import open_clip
    except ImportError as error:
        raise RewardError("CLIP rewards need the package open_clip_torch; install it with: pip install open_clip_torch") from error
    a = architecture
    with torch.device("meta"):
        # Half a unit guards the width of the MLP, int(width * ratio), against rounding.
        model = open_clip.model.CLIP(
            a.embed_dim,
            open_clip.model.CLIPVisionCfg(
                layers=a.vision_layers,
                width=a.vision_width,
                head_width=a.vision_width // a.vision_heads,
                mlp_ratio=(a.vision_mlp + 0.5) / a.vision_width,
                patch_size=a.patch_size,
                image_size=a.image_size,
            ),
            open_clip.model.CLIPTextCfg(
                context_length=a.context_length,
                vocab_size=a.vocabulary,
                width=a.text_width,
                heads=a.text_heads,
                layers=a.text_layers,
                mlp_ratio=(a.text_mlp + 0.5) / a.text_width,
            ),
            quick_gelu=a.quick_gelu,
        )
    model.load_state_dict(state, assign=True)
    model.attn_mask = torch.full((a.context_length, a.context_length), -torch.inf).triu_(1)
    return model.eval().requires_grad_(False)


def clip_model(state: StateDict, hints: Hints) -> tuple[nn.Module, ClipArchitecture]:
    """State dict in either layout -> open_clip.CLIP in the precision of its image tower."""
    openai = "input_resolution" in state
    state = {key: tensor for key, tensor in state.items() if key not in _OPENAI_SIZES}
    if has_transformers_layout(state):
        state = to_open_clip_layout(state)
        openai = state["visual.conv1.weight"].shape[0] <= 1024
    precision = state["visual.conv1.weight"].dtype
    unreadable = {tensor.dtype for tensor in state.values()}.difference(_FLOATS)
    if unreadable:
        raise RewardError(f"The weights are stored as {', '.join(map(str, unreadable))}; save them as float16, bfloat16 or float32.")
    architecture = infer_architecture(state, hints, openai)
    return build({key: tensor.to(precision) for key, tensor in state.items()}, architecture), architecture
