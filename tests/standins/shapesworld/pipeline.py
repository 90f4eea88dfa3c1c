"""ShapesWorld's checkpoint behind ComfyUI's own loader and sampler, in this process. Import after `harness.inprocess.load_comfyui`."""

from collections.abc import Sequence
from pathlib import Path

import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from . import expand, text


class Pipeline:
    """Prompts in, pictures out."""

    def __init__(self, models_dir: str | Path, checkpoint: str = expand.CHECKPOINT):
        path = str(expand.expand(models_dir, checkpoint)[0])
        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(path)
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
    def latents(self, prompts: Sequence[str], seed: int, cfg: float = 1.0, steps: int = 20, model: ModelPatcher | None = None) -> Tensor:
        """A latent for each prompt (B,16,8,8) in the model's space, by this model or a patched clone of it."""
        empty = torch.zeros(len(prompts), 16, 8, 8)
        noise = comfy.sample.prepare_noise(empty, seed)
        conditioning = [[[context[:, : text.CONTEXT], extra]] for [[context, extra]] in (self.encode(prompts), self.encode([""]))]
        options = {"seed": seed, "disable_pbar": True}
        out = comfy.sample.sample(model or self.model, noise, steps, cfg, "euler", "simple", *conditioning, empty, **options)
        return self.model.model.process_latent_in(out)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,3,64,64), about [0,1], by the checkpoint's VAE at its trained width, in bfloat16."""
        with torch.autocast(latents.device.type, torch.bfloat16):
            return self.decoder(latents).float()

    @torch.inference_mode()
    def pictures(self, latents: Tensor) -> Tensor:
        """(B,3,64,64) in [0,1]"""
        return torch.cat([self.decode(part) for part in latents.split(256)]).clamp(0, 1)
