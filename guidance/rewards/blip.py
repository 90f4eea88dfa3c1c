"""BLIP's encoders (arXiv 2201.12086) in plain PyTorch: a ViT, and a BERT whose layers attend to the picture. Names are those of the weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B,N,C), (B,M,C), (B,M,C) -> (B,N,C). mask: (B,M), true where to look."""
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=2)
        return self.proj(attend(query, key, value, self.heads))


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """Prepared pixels (B,3,S,S) -> (B, 1 + patches, width)."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, inner: int):
        super().__init__()
        self.image_size = image_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, heads, inner) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


class Residual(nn.Module):
    """LayerNorm(x + dense(y))."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dense(y))


class TextAttention(nn.Module):
    def __init__(self, width: int, heads: int, source_width: int):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(source_width, width),
                "value": nn.Linear(source_width, width),
            }
        )
        self.output = Residual(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(
            attend(self.self["query"](x), self.self["key"](source), self.self["value"](source), self.heads, mask), x
        )


class TextLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, picture_width: int):
        super().__init__()
        self.attention = TextAttention(width, heads, width)
        self.crossattention = TextAttention(width, heads, picture_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(inner, width)

    def forward(self, x: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), picture)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextEmbeddings(nn.Module):
    def __init__(self, vocabulary: int, places: int, width: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(places, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]])


class TextLayers(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, inner: int, picture_width: int):
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(width, heads, inner, picture_width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask, picture)
        return x


class TextEncoder(nn.Module):
    """Tokens (B,N), their mask (B,N), true where there is text, and encoded pictures (B,M,picture_width) -> (B,N,width)."""

    def __init__(
        self, vocabulary: int, places: int, width: int, layers: int, heads: int, inner: int, picture_width: int
    ):
        super().__init__()
        self.embeddings = TextEmbeddings(vocabulary, places, width)
        self.encoder = TextLayers(width, layers, heads, inner, picture_width)

    def forward(self, tokens: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        return self.encoder(self.embeddings(tokens), mask, picture)
