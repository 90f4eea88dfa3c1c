"""One model and everything to guide it by, sampled through ComfyUI."""

from collections.abc import Callable
from functools import cache

import comfy.sample
import comfy.samplers
import torch
from reward_guidance.guidance.estimators import Settings, Smoothing
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.loaded import LoadedReward, manage_reward
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.nodes.wiring.tiny_decoders import TAESD
from reward_guidance.nodes.wiring.vae_decoder import Decoder
from torch import Tensor

from . import sizes

HALVINGS = {"whole size": 0, "half size": 1, "quarter size": 2}
"""Of what the tiny autoencoder makes, in place of those that it chooses by the size of the picture."""
Attach = Callable
"""MODEL -> MODEL."""


def fixed(decoder: TAESD, halvings: int) -> TAESD:
    """The decoder for every picture so much coarser."""
    decoder.halvings = lambda height, width: halvings
    return decoder


@cache
def managed(reward: str, reduced: bool) -> LoadedReward:
    return manage_reward(sizes.reward(reward, reduced))


class World:
    def __init__(self, name: str, reduced: bool):
        self.name, self.reduced, self.family = name, reduced, sizes.FAMILIES[name]
        torch.manual_seed(0)
        self.model = sizes.model(self.family, reduced)
        self.latent_format = self.model.model.latent_format
        self.positive, self.negative = sizes.conditioning(self.family), sizes.conditioning(self.family)
        self.rewards: dict[tuple[str, str], LatentReward] = {}

    @torch.inference_mode(False)
    def reward(self, reward: str, decoder: str) -> LatentReward:
        if (reward, decoder) not in self.rewards:
            self.rewards[reward, decoder] = LatentReward(
                managed(reward, self.reduced), self.decoder(decoder), sizes.PROMPT
            )
        return self.rewards[reward, decoder]

    def decoder(self, name: str) -> Decoder:
        """One of ComfyUI's, with a change to it after a comma."""
        kind, _, change = name.partition(", ")
        made = sizes.decoder(kind, self.family, self.reduced, self.latent_format)
        if change == "float32":
            made.modules[0].float()
        if change == "channels last":
            made.modules[0].to(memory_format=torch.channels_last)
        return fixed(made, HALVINGS[change]) if change in HALVINGS else made

    def guidance(self, reward: LatentReward, smoothing: int = 0, every: int = 1, estimator: str = "shift") -> Attach:
        settings = Settings(temperature=0.05, smoothing=Smoothing(smoothing), every=every)
        return RewardGuidance(reward, estimator, settings).attach

    def noise(self, side: int, batch: int) -> Tensor:
        return torch.randn(self.family.shape(side, batch))

    def sample(
        self,
        noise: Tensor,
        steps: int,
        model=None,
        sampler=None,
        cfg: float | None = None,
        callback: Callable | None = None,
    ) -> Tensor:
        """Latents as a KSampler leaves them."""
        model = model or self.model
        sampler = sampler or comfy.samplers.sampler_object("euler")
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        return comfy.sample.sample_custom(
            model, noise, self.family.cfg if cfg is None else cfg, sampler, sigmas, self.positive, self.negative, torch.zeros_like(noise),
            callback=callback, disable_pbar=True, seed=0,
        )  # fmt: skip


def weights(*modules: torch.nn.Module) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for module in modules for tensor in module.parameters())
