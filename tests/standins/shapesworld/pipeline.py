"""ShapesWorld's checkpoints behind ComfyUI's own loader and sampler, in this process. Import after `harness.inprocess.load_comfyui`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from torch import Tensor

from . import expand, text


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is to be sampled."""

    sampling: str | None
    """What ModelSamplingDiscrete must be told; None where that node is not needed."""
    steps: int


KINDS = {"flow": Kind(None, 20), "diffusion": Kind("eps", 20), "one_step": Kind("x0", 1)}


class Pipeline:
    """Prompts in, pictures out."""

    def __init__(self, models_dir: str | Path, checkpoint: str = expand.CHECKPOINT, kind: str = "flow"):
        """checkpoint: the flow model's file name."""
        expand.expand(models_dir, checkpoint)
        self.kind = KINDS[kind]
        path = Path(models_dir) / "checkpoints" / expand.checkpoints(checkpoint)[kind]
        model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
        self.model = ModelSamplingDiscrete().patch(model, self.kind.sampling, False)[0] if self.kind.sampling else model
        self.model.model_options["transformer_options"]["optimized_attention_override"] = text.weighted_attention
        self.decoder = expand.narrow_decoder().float().to(memory_format=torch.channels_last)
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list:
        """One conditioning with a row for each prompt."""
        for prompt in set(prompts) - self.encoded.keys():
            [[context, extra]] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
            self.encoded[prompt] = context, extra["pooled_output"]
        context, pooled = zip(*[self.encoded[prompt] for prompt in prompts], strict=True)
        return [[torch.cat(context), {"pooled_output": torch.cat(pooled)}]]

    @torch.inference_mode()
    def latents(
        self,
        prompts: Sequence[str],
        seed: int,
        cfg: float = 1.0,
        steps: int | None = None,
        model: ModelPatcher | None = None,
        sampler: str = "euler",
        scheduler: str = "simple",
        noise: Tensor | None = None,
    ) -> Tensor:
        """A latent for each prompt (B,16,8,8) in the model's space, by this model or a patched clone of it.

        noise: to begin with, of unit variance, instead of the seed's.
        """
        empty = torch.zeros(len(prompts), 16, 8, 8)
        noise = comfy.sample.prepare_noise(empty, seed) if noise is None else noise
        choices = (steps or self.kind.steps, cfg, sampler, scheduler)
        out = comfy.sample.sample(
            model or self.model, noise, *choices, *self.conditions(prompts), empty, seed=seed, disable_pbar=True
        )
        return self.model.model.process_latent_in(out)

    def conditions(self, prompts: Sequence[str]) -> tuple[list, list]:
        """Positive and negative, each with a row for each prompt and cut to the tokens that differ."""
        return self.short(self.encode(prompts)), self.short(self.encode([""]))

    @staticmethod
    def short(conditioning: list) -> list:
        [[context, extra]] = conditioning
        return [[context[:, : text.CONTEXT], extra]]

    @torch.inference_mode()
    def denoised(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], cfg: float = 1.0) -> Tensor:
        """D of states (B,16,8,8) at noise levels (B,): a sampler that asks once and leaves."""
        answers = []

        def ask(model, start, sigmas, extra_args=None, **_):
            answers.append(model(x, sigma, **(extra_args or {})))
            return start

        sampler, empty = comfy.samplers.KSAMPLER(ask), torch.zeros_like(x)
        comfy.sample.sample_custom(
            self.model, empty, cfg, sampler, torch.ones(2), *self.conditions(prompts), empty, disable_pbar=True
        )
        return answers[0]

    def decode(self, latents: Tensor) -> Tensor:
        """(B,3,64,64), about [0,1], by the checkpoint's VAE at its trained width."""
        return self.decoder(latents.float())

    @torch.inference_mode()
    def pictures(self, latents: Tensor) -> Tensor:
        """(B,3,64,64) in [0,1]"""
        return torch.cat([self.decode(part) for part in latents.split(256)]).clamp(0, 1)
