"""The two tiny CLIP rewards: one in open_clip's format to guide with, one in transformers' format to check with.

Both have heads of 64 channels, GELU, and a vocabulary cut to the world's words; `full_vocabulary` puts the rows back in their places.
"""

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from . import world

VOCABULARY, START, END, PLACES = 49408, 49406, 49407, 24
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EMBEDDING = 64
VISION = {
    "guide": {"patch_size": 8, "width": 128, "layers": 4},
    "heldout": {"patch_size": 16, "width": 128, "layers": 5},
}
TEXT = {"guide": {"width": 64, "heads": 1, "layers": 2}, "heldout": {"width": 128, "heads": 2, "layers": 1}}


def word_ids() -> list[int]:
    """The tokens of all captions, in order; the end of text is the greatest, as open_clip expects."""
    return sorted(
        {START, END, *SimpleTokenizer().encode(" ".join(world.caption(scene) for scene in world.all_scenes()))}
    )


def tokenize(captions: list[str]) -> Tensor:
    """Captions (eight words each) -> rows of the cut vocabulary (B,10)."""
    place = {token: i for i, token in enumerate(word_ids())}
    encode = SimpleTokenizer().encode
    return torch.tensor([[place[token] for token in (START, *encode(caption), END)] for caption in captions])


def build(kind: str) -> CLIP:
    vision = {"image_size": world.SIDE, "head_width": 64, **VISION[kind]}
    words = {"context_length": 10, "vocab_size": len(word_ids()), **TEXT[kind]}
    return CLIP(EMBEDDING, vision, words)


def normalize(pictures: Tensor) -> Tensor:
    return (pictures - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def full_vocabulary(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cut tables -> 49408 words and 24 places; what was never trained is zero."""
    tokens, places = weights["token_embedding.weight"], weights["positional_embedding"]
    table = tokens.new_zeros(VOCABULARY, tokens.shape[1])
    table[word_ids()] = tokens
    longer = torch.cat([places, places.new_zeros(PLACES - len(places), places.shape[1])])
    return weights | {"token_embedding.weight": table, "positional_embedding": longer}


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names -> those of transformers' CLIPModel."""
    renamed = {}
    for name, value in weights.items():
        tower, rest = ("vision_model", name[7:]) if name.startswith("visual.") else ("text_model", name)
        if ".attn.in_proj_" in rest:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{tower}.{_layer(rest).replace('in_proj_', f'{part}_proj.')}"] = piece
        elif rest in _SPECIAL[tower]:
            target, transposed = _SPECIAL[tower][rest]
            renamed[target] = value.T if transposed else value
        else:
            renamed[f"{tower}.{_layer(rest)}"] = value
    return renamed


def _layer(name: str) -> str:
    for old, new in _LAYER:
        name = name.replace(old, new)
    return name


_LAYER = (
    ("transformer.resblocks.", "encoder.layers."), ("attn.", "self_attn."), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
    ("c_fc", "fc1"), ("c_proj", "fc2"), ("ln_final", "final_layer_norm"), ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"),
)  # fmt: skip
_SPECIAL = {
    "vision_model": {
        "class_embedding": ("vision_model.embeddings.class_embedding", False),
        "positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
        "conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
        "proj": ("visual_projection.weight", True),
    },
    "text_model": {
        "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
        "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
        "text_projection": ("text_projection.weight", True),
        "logit_scale": ("logit_scale", False),
    },
}


class Scorer:
    """A trained reward at its cut vocabulary: pictures (B,3,64,64) and as many captions -> scores (B,), exp(logit_scale) times cosine."""

    def __init__(self, weights: dict[str, Tensor], kind: str):
        self.model = build(kind).eval().requires_grad_(False)
        self.model.load_state_dict({key: value.float() for key, value in weights.items()})

    def __call__(self, pictures: Tensor, captions: list[str]) -> Tensor:
        seen = self.model.encode_image(normalize(pictures), normalize=True)
        said = self.model.encode_text(tokenize(captions), normalize=True)
        return self.model.logit_scale.exp() * (seen * said).sum(1)
