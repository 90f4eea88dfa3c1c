"""A CLIP-L made by hand, not trained: it tells words and their places apart, and needs no stored weights.

The 768 channels are five zones, each holding a code and its negative so that layer normalisation sees mean zero:
flag (end of text), token, place, feature (of token and place together, by layer 0), bag (mean of the features so far, by layer 1).
The other ten layers do nothing. The end of text and all padding behind a caption come out identical, because places after the
ninth are alike and nobody listens to the end token.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTH, PLACES, LAYERS = 49408, 768, 77, 12
START, END = 49406, 49407
CONTEXT = 10
"""Start, eight words, and one token that stands for all the identical ones at the end."""
PADDING = PLACES - CONTEXT + 1
FLAG, TOKEN, PLACE, FEATURE, BAG = slice(0, 2), slice(2, 194), slice(194, 386), slice(386, 578), slice(578, 768)


def clip_l(layers: int = LAYERS) -> dict[str, Tensor]:
    """State dict in the format of transformers' CLIPTextModel, float16."""
    random = np.random.RandomState(20)
    weights = {
        "text_model.embeddings.token_embedding.weight": _tokens(random),
        "text_model.embeddings.position_embedding.weight": _places(random),
        "text_model.final_layer_norm.weight": torch.ones(WIDTH),
        "text_model.final_layer_norm.bias": torch.zeros(WIDTH),
        "text_projection.weight": torch.eye(WIDTH),
    }
    for i in range(layers):
        weights |= {f"text_model.encoder.layers.{i}.{name}": value for name, value in _idle_layer().items()}
    _fill_features(weights, random)
    _fill_bag(weights)
    return {name: value.half() for name, value in weights.items()}


def _mirrored(code: np.ndarray) -> Tensor:
    half = torch.from_numpy(code).float()
    return torch.cat([half, -half], 1)


def _signs(random: np.random.RandomState, rows: int) -> Tensor:
    return _mirrored(random.randint(0, 2, (rows, 96)) * 2 - 1)


def _tokens(random: np.random.RandomState) -> Tensor:
    table = torch.zeros(TOKENS, WIDTH)
    table[:, TOKEN] = _signs(random, TOKENS)
    table[END, FLAG] = torch.tensor([2.0, -2.0])
    return table


def _places(random: np.random.RandomState) -> Tensor:
    table = torch.zeros(PLACES, WIDTH)
    table[:CONTEXT, PLACE] = _signs(random, CONTEXT)
    table[CONTEXT:] = table[CONTEXT - 1]
    return table


def _idle_layer() -> dict[str, Tensor]:
    layer: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{name}.weight": torch.zeros(WIDTH, WIDTH), f"self_attn.{name}.bias": torch.zeros(WIDTH)}
    for name, rows, columns in (("fc1", 4 * WIDTH, WIDTH), ("fc2", WIDTH, 4 * WIDTH)):
        layer |= {f"mlp.{name}.weight": torch.zeros(rows, columns), f"mlp.{name}.bias": torch.zeros(rows)}
    for name in ("layer_norm1", "layer_norm2"):
        layer |= {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    return layer


def _fill_features(weights: dict[str, Tensor], random: np.random.RandomState) -> None:
    """Layer 0: random nonlinear features of token and place, so that a mean over words still knows which word stood where."""
    mlp = "text_model.encoder.layers.0.mlp."
    joint = slice(TOKEN.start, PLACE.stop)
    weights[mlp + "fc1.weight"][:, joint] = (
        torch.from_numpy(random.standard_normal((4 * WIDTH, 384))).float() / 384**0.5
    )
    weights[mlp + "fc2.weight"][FEATURE] = _mirrored(
        random.standard_normal((4 * WIDTH, 96)) / (4 * WIDTH) ** 0.5 * 1.5
    ).T
    weights[mlp + "fc2.bias"][:] = -0.55 * weights[mlp + "fc2.weight"].sum(
        1
    )  # the mean of the activation at this input variance


def _fill_bag(weights: dict[str, Tensor]) -> None:
    """Layer 1: every token takes the mean of the features up to its own, end tokens left out."""
    attention = "text_model.encoder.layers.1.self_attn."
    heads = torch.arange(0, WIDTH, 64)
    weights[attention + "q_proj.bias"][heads] = 16.0
    weights[attention + "k_proj.weight"][heads, FLAG.start] = -16.0
    copied, half = torch.arange(95), torch.eye(95) * 6
    weights[attention + "v_proj.weight"][copied, FEATURE.start + copied] = 1.0
    weights[attention + "out_proj.weight"][BAG, :95] = torch.cat([half, -half])


def weighted_attention(_, q: Tensor, k: Tensor, v: Tensor, heads: int, *__, **___) -> Tensor:
    """Attention to a context cut to CONTEXT tokens, the last of which counts as often as the padding it stands for.

    The transformer option `optimized_attention_override` of ComfyUI; the result is that of the whole context, with a third of the work.
    """
    weight = torch.zeros(k.shape[1], dtype=q.dtype, device=q.device)
    weight[CONTEXT - 1] = math.log(PADDING)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=weight[None, None, None]).transpose(1, 2).flatten(2)
