"""ImageReward v1.0 (arXiv 2304.05977): a head on BLIP, whose text encoder attends to the picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import pass_out_of_memory, short
from .aesthetic import collapse
from .base import PromptMemory, Reward, RewardError, at_least_float32, warn_of_truncated_text
from .blip import encode_text, text_encoder, vision_encoder
from .clip import layer_activation_bytes, preprocess
from .clip_checkpoint import check_floats
from .files import LoadOptions, Shapes, StateDict, Weights, one_line
from .published import BERT

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output on its training set, from the published code."""
_TOKENS = 35
"""Tokens of a prompt that are read."""
_ADDED_WORDS = 2
"""BLIP's tokens [DEC] and [ENC], which BERT's vocabulary does not have."""
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Prefixes of tensors from BLIP's training that the reward does not use."""
_VOCABULARIES = ("vocab.txt", "tokenizer.json")
"""Vocabulary files, in order of preference."""
_SPECIAL = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


class Vocabulary:
    """The tokenizer of bert-base-uncased."""

    def __init__(self, tokenizer: Any):
        """tokenizer: tokenizers.Tokenizer."""
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.start, self.end, self.padding = map(tokenizer.token_to_id, ("[CLS]", "[SEP]", "[PAD]"))

    def __call__(self, prompt: str) -> list[int]:
        """The tokens of a prompt, truncated to 35."""
        return [self.start, *self._encode(prompt).ids[: _TOKENS - 2], self.end]

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt beyond the tokens that are read."""
        offsets = self._encode(prompt).offsets[_TOKENS - 2 :]
        return prompt[offsets[0][0] :].strip() if offsets else ""

    def _encode(self, prompt: str):
        return self.tokenizer.encode(prompt.encode("utf-8", "replace").decode(), add_special_tokens=False)


class ImageReward(Reward):
    """How well a picture fits its prompt, and its quality. The encoders may have half precision, not the head."""

    name = "ImageReward"
    description = "ImageReward"
    needs_prompt = True

    def __init__(
        self,
        visual_encoder: Any,
        text_encoder: Any,
        weight: Tensor,
        bias: Tensor,
        vocabulary: Vocabulary,
    ):
        """The encoders are those of blip.py. weight (W,), bias (): the affine head on the first token's state."""
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.weight = nn.Parameter((weight / _STD).float(), requires_grad=False)
        self.bias = nn.Parameter(((bias - _MEAN) / _STD).float(), requires_grad=False)
        self.vocabulary = vocabulary
        self.activation_bytes = _activation_bytes(visual_encoder, text_encoder)
        self._tokens = PromptMemory[str, list[int]]()

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        prepared = preprocess(at_least_float32(pixels), self.visual_encoder.patch_embed.img_size[0])
        picture = self.visual_encoder(prepared.to(self.visual_encoder.cls_token.dtype))
        tokens, mask = (tensor.to(picture.device, non_blocking=True) for tensor in self.tokenize(prompts))
        state = at_least_float32(encode_text(self.text_encoder, tokens, mask, picture)[:, 0])
        return state @ self.weight.to(state) + self.bias.to(state)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B,N), padded to the longest prompt, and a mask (B,N), true where they are text."""
        rows = self._tokens(prompts, self._tokenize)
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [self.vocabulary.padding] * (longest - len(row)) for row in rows])
        return tokens, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        warn_of_truncated_text(self, prompts)
        return [self.vocabulary(prompt) for prompt in prompts]

    def truncated_text(self, prompt: str) -> str:
        return self.vocabulary.truncated_text(prompt)


def _activation_bytes(vision: Any, text: Any) -> int:
    """Memory per picture. A text layer has at most 35 tokens, but keys and values of the whole picture."""
    size = vision.cls_token.element_size()
    tokens, width = vision.pos_embed.shape[1:]
    text_width, layers = text.embeddings.word_embeddings.embedding_dim, len(text.encoder.layer)
    read = layer_activation_bytes(_TOKENS, text_width, size) + 2 * tokens * text_width * size
    return len(vision.blocks) * layer_activation_bytes(tokens, width, size) + layers * read


def is_image_reward(keys: Shapes) -> bool:
    """Whether these are the keys of an ImageReward checkpoint."""
    return all(
        f"blip.{key}" in keys for key in ("visual_encoder.pos_embed", "text_encoder.embeddings.word_embeddings.weight")
    )


def load_image_reward(weights: Weights, options: LoadOptions) -> ImageReward:
    """The reward of a checkpoint. Raises RewardError if it has unknown tensors, or there is no vocabulary."""
    state = {key: tensor for key, tensor in weights.state.items() if not key.startswith(_UNUSED)}
    check_floats(state)
    precision = options.precision(state["blip.visual_encoder.cls_token"].dtype)
    weight, bias = collapse(_under("mlp.", state))
    vision, text = (
        {key: tensor.to(precision) for key, tensor in _under(f"blip.{part}_encoder.", state).items()}
        for part in ("visual", "text")
    )
    encoders = vision_encoder(vision, weights.hints), text_encoder(text, weights.hints)
    if unknown := [key for key in state if not key.startswith(("mlp.", "blip.visual_encoder.", "blip.text_encoder."))]:
        raise RewardError(f"it holds {short(unknown[0])}, which ImageReward has no place for.")
    words = len(text["embeddings.word_embeddings.weight"])
    folder = weights.path.parent
    reward = ImageReward(*encoders, weight, bias, find_vocabulary(folder, words))
    reward.files = tuple(folder / name for name in _VOCABULARIES)
    return reward


def _under(prefix: str, state: StateDict) -> StateDict:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def find_vocabulary(folder: Path, words: int) -> Vocabulary:
    """The vocabulary beside the weights, whose embedding has `words` rows. Raises RewardError if there is none."""
    for file in (folder / name for name in _VOCABULARIES):
        if file.is_file():
            return _read_vocabulary(file, words)
    raise RewardError(f"it reads prompts with BERT's vocabulary; put {BERT} into {folder}.")


def _read_vocabulary(file: Path, words: int) -> Vocabulary:
    try:
        tokenizer = _read_tokenizer(file)
    except Exception as error:  # tokenizers raises no more specific type
        pass_out_of_memory(error, f"{file.name} was read")
        raise RewardError(f"{file.name} beside it is damaged; download it again ({one_line(error)}).") from error
    known = tokenizer.get_vocab(with_added_tokens=False)
    found = 1 + max(known.values(), default=-1)
    if found not in (words, words - _ADDED_WORDS) or not known.keys() >= _SPECIAL:
        raise RewardError(
            f"{file.name} beside it has {found} words and the weights {words - _ADDED_WORDS}; take {BERT}."
        )
    return Vocabulary(tokenizer)


def _read_tokenizer(file: Path) -> Any:
    """tokenizers.Tokenizer, as transformers makes it of a vocab.txt or a tokenizer.json."""
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast  # type: ignore[attr-defined]

    if file.suffix == ".json":
        return PreTrainedTokenizerFast(tokenizer_file=str(file)).backend_tokenizer
    # transformers 4 names the first parameter vocab_file and 5 vocab; 5.0 does not lower the case by itself.
    return BertTokenizerFast(str(file), do_lower_case=True).backend_tokenizer
