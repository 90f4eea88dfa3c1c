"""Tiny random rewards in the published key layouts, each with a reference made of the original libraries' parts.

A reference maps pixels as its image tower takes them (B,3,S,S) and prompts to scores (B,).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

Reference = Callable[[Tensor, Sequence[str]], Tensor]

HEADS = {"vision_heads": "2", "text_heads": "3"}
"""Of all the towers here, which are too narrow for heads 64 wide."""
CONTEXT, SIZE, WIDTH = 12, 24, 32


def open_clip_model(quick_gelu: bool = False) -> nn.Module:
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(
        layers=2, width=WIDTH, head_width=16, patch_size=8, image_size=SIZE, mlp_ratio=2.0
    )
    text = open_clip.model.CLIPTextCfg(context_length=CONTEXT, width=24, heads=3, layers=2)
    model = open_clip.model.CLIP(16, vision, text, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(10)
    return model


def transformers_model(hidden_act: str = "gelu", **vision) -> transformers.CLIPModel:
    torch.manual_seed(1)
    shared = {"num_hidden_layers": 2, "intermediate_size": 40, "hidden_act": hidden_act}
    vision = {"hidden_size": WIDTH, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8, **shared, **vision}
    text = {"hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": CONTEXT, **shared}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).eval()


def tokens(prompts: Sequence[str]) -> Tensor:
    return open_clip.tokenizer.tokenize(list(prompts), context_length=CONTEXT)


def open_clip_scores(model: nn.Module) -> Reference:
    return lambda pixels, prompts: model.get_logits(pixels, tokens(prompts))[0].diag()


def transformers_scores(model: transformers.CLIPModel) -> Reference:
    return lambda pixels, prompts: model(input_ids=tokens(prompts), pixel_values=pixels).logits_per_image.diag()


def save_open_clip(path: Path, quick_gelu: bool = False) -> Reference:
    model = open_clip_model(quick_gelu)
    save_file(model.state_dict(), path, HEADS | {"quick_gelu": str(quick_gelu)})
    return open_clip_scores(model)


def save_transformers(folder: Path, hidden_act: str = "gelu") -> Reference:
    """A Hugging Face folder."""
    model = transformers_model(hidden_act)
    model.save_pretrained(folder)
    return transformers_scores(model)


def save_towers(vision: Path, text: Path) -> Reference:
    """One CLIP in two files, as in models/clip_vision and models/text_encoders. Its scale is 100, which neither file states."""
    model = transformers_model("quick_gelu").requires_grad_(False)
    model.logit_scale.fill_(math.log(100))
    for path, prefixes in (
        (vision, ("vision_model.", "visual_projection.")),
        (text, ("text_model.", "text_projection.")),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefixes)}, path, HEADS)
    return transformers_scores(model)


def save_hps(path: Path) -> Reference:
    """As safetensors; test_rewards_published.py packs one as its authors do."""
    model = open_clip_model().requires_grad_(False)
    save_file(model.state_dict(), path, HEADS | {"kind": "HPS v2.1"})

    def scores(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens(prompts), normalize=True)
        return (pictures @ texts.T).diag()

    return scores


def head(width: int, sizes: Sequence[int] = (20, 12, 8, 4)) -> nn.Module:
    """The layers of LAION's predictor, and of ImageReward's, which are the same; `layers` is part of their keys."""
    torch.manual_seed(2)
    a, b, c, d = (nn.Linear(*ends) for ends in zip((width, *sizes), sizes, strict=False))
    layers = nn.Sequential(a, nn.Dropout(0.2), b, nn.Dropout(0.2), c, nn.Dropout(0.1), d, nn.Linear(sizes[-1], 1))
    return nn.ModuleDict({"layers": layers}).eval()


def aesthetic_tower(hidden_act: str = "quick_gelu") -> transformers.CLIPModel:
    """With as many patches as L/14, by which it is found."""
    return transformers_model(hidden_act, image_size=32, patch_size=2)


def save_aesthetic(path: Path, tower: Path) -> Reference:
    """The head, and the CLIP with its image tower in a file of its own."""
    mlp, model = head(16), aesthetic_tower()
    torch.save(mlp.state_dict(), path)
    tower.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), tower, HEADS)

    def scores(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        features = model.visual_projection(model.vision_model(pixels).pooler_output)
        return mlp["layers"](features / features.norm(dim=1, keepdim=True))[:, 0]

    return scores


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz0123456789,.!?'-()",
    "red",
    "circle",
    "cat",
    "large",
    "ground",
]
WORDS += [f"##{word}" for word in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["猫", "##ing"]
"""A vocabulary as BERT's, but small."""


class BlipReward(nn.Module):
    """ImageReward's module (THUDM/ImageReward, ImageReward.py), of transformers' BLIP encoders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        vision = {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 8,
        }
        text = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "encoder_hidden_size": WIDTH,
        }
        self.visual_encoder = transformers.BlipVisionModel(
            transformers.BlipVisionConfig(image_size=SIZE, layer_norm_eps=1e-6, initializer_range=0.1, **vision)
        )
        self.text_encoder = transformers.BlipTextModel(
            transformers.BlipTextConfig(
                vocab_size=len(WORDS) + 2, max_position_embeddings=40, initializer_range=0.3, **text
            ),
            add_pooling_layer=False,
        )
        self.mlp = head(24)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        picture = self.visual_encoder(pixels).last_hidden_state
        read = self.text_encoder(
            tokens,
            attention_mask=mask,
            encoder_hidden_states=picture,
            encoder_attention_mask=torch.ones(picture.shape[:2], dtype=torch.long),
        )
        return (self.mlp["layers"](read.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


_BLIP_NAMES = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.patch_embedding", "patch_embed.proj"), ("embeddings.position_embedding", "pos_embed"),
    ("post_layernorm", "norm"), ("encoder.layers", "blocks"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"), ("layer_norm", "norm"),
)  # fmt: skip


def image_reward_state(model: BlipReward) -> dict[str, Tensor]:
    """In the names of ImageReward.pt, with what it holds besides."""
    state = {}
    for key, value in model.visual_encoder.state_dict().items():
        for theirs, published in _BLIP_NAMES:
            key = key.replace(theirs, published)
        state[f"blip.visual_encoder.{key}"] = value
    state |= {f"blip.text_encoder.{key}": value for key, value in model.text_encoder.state_dict().items()}
    state |= {f"mlp.{key}": value for key, value in model.mlp.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for name, width in (("vision_proj", WIDTH), ("text_proj", 24)):
        state |= {f"blip.{name}.weight": torch.zeros(16, width), f"blip.{name}.bias": torch.zeros(16)}
    return {key: value.contiguous() for key, value in state.items()}


def save_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def bert_tokenizer() -> transformers.BertTokenizer:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def save_image_reward(path: Path) -> Reference:
    """The weights, and vocab.txt beside them."""
    model = BlipReward().eval().requires_grad_(False)
    save_file(image_reward_state(model), path, HEADS)
    save_vocabulary(path.parent)
    tokenizer = bert_tokenizer()

    def scores(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        text = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return model(pixels, text.input_ids, text.attention_mask)

    return scores
