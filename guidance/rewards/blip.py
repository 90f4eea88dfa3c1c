"""BLIP's encoders (arXiv 2201.12086): timm's ViT, and transformers' BERT with cross-attention to the image.

Both have the parameter names of the published weights. They are built on the meta device and take over the given
tensors, so nothing is allocated twice. Their sizes are read from the shapes of the weights.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardError
from .clip_checkpoint import check_heads, check_image_size
from .files import Hints, StateDict


def vision_encoder(state: StateDict, hints: Hints) -> Any:
    """timm's VisionTransformer: normalised pixels (B,3,S,S) -> (B, 1 + patches, width).

    Raises RewardError if timm is missing, or if the sizes are impossible.
    """
    try:
        from timm.models.vision_transformer import Block, VisionTransformer
    except ImportError as error:
        raise RewardError("ImageReward needs the package timm; install it with: pip install timm") from error
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    heads = int(hints.get("vision_heads", max(1, width // 64)))
    check_heads("vision", width, heads)
    image_size = patch_size * math.isqrt(state["pos_embed"].shape[1] - 1)
    check_image_size(image_size)
    sizes: dict[str, Any] = {"num_classes": 0, "global_pool": "", "embed_dim": width, "depth": 0, "num_heads": heads}
    # Half a unit protects the width of the MLP, int(width * ratio), from rounding.
    ratio = (len(state["blocks.0.mlp.fc1.bias"]) + 0.5) / width
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    with torch.device("meta"):
        encoder = VisionTransformer(image_size, patch_size, norm_layer=norm, weight_init="skip", **sizes)
        # The blocks are added here because timm 1.0.17, which open_clip allows, cannot build them on the meta device.
        blocks = (Block(width, heads, ratio, qkv_bias=True, norm_layer=norm) for _ in range(_count("blocks", state)))
        encoder.blocks = nn.Sequential(*blocks)
    return _with_weights(encoder, state)


def text_encoder(state: StateDict, hints: Hints) -> Any:
    """transformers' BlipTextModel, which `encode_text` calls. Raises RewardError if the sizes are impossible."""
    from transformers import BlipTextConfig, BlipTextModel

    words, width = state["embeddings.word_embeddings.weight"].shape
    places = len(state["embeddings.position_embeddings.weight"])
    heads = int(hints.get("text_heads", max(1, width // 64)))
    check_heads("text", width, heads)
    config = BlipTextConfig(
        vocab_size=words,
        max_position_embeddings=places,
        hidden_size=width,
        num_hidden_layers=_count("encoder.layer", state),
        num_attention_heads=heads,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
    )
    with torch.device("meta"):
        encoder: Any = BlipTextModel(config, add_pooling_layer=False)
    # The state dict does not hold this buffer.
    encoder.embeddings.position_ids = torch.arange(places)[None]
    return _with_weights(encoder, state)


def encode_text(encoder: Any, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """Tokens (B,N), their mask (B,N), true where there is text, and an encoded image (B,M,V) -> (B,N,width).

    Calls the parts of BlipTextModel, because its own forward reads the mask on the host and so waits for the GPU.
    """
    embedded = encoder.embeddings(tokens)
    penalty = (~mask)[:, None, None].to(embedded.dtype) * torch.finfo(embedded.dtype).min
    return encoder.encoder(embedded, attention_mask=penalty, encoder_hidden_states=image).last_hidden_state


def _with_weights(encoder: nn.Module, state: StateDict) -> nn.Module:
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


def _count(stack: str, state: StateDict) -> int:
    return len({key.removeprefix(f"{stack}.").split(".")[0] for key in state if key.startswith(f"{stack}.")})
