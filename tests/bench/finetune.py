"""What a guidance network costs beside a LoRA finetune by reward backpropagation, to the same held-out reward.

On ShapesWorld's diffusion model. The finetune samples without a graph, goes on with one through the last calls of the model, decodes, and
climbs the reward (DRaFT, arXiv 2309.17400; ReFL, arXiv 2304.05977); it stops at its best held-out reward on pictures kept for validation.
Passes are counted by hooks, one for each picture that goes through; FLOPs are those of one pass, measured, times the count. Seconds are of
one CPU core. Prints markdown tables.

usage: python tests/bench/finetune.py [MODELS_DIR] [--recipes draft1,draft1-kl,draft2,refl] [--networks 500,2000] [--work DIR]
"""

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from reward_guidance.guidance.process import Diffusion
from reward_guidance.guidance.randomness import generator
from reward_guidance.guidance.rewards import evaluate
from reward_guidance.nodes.runtime import NetworkGuidance, differentiable_model, manage_network
from reward_guidance.tests.bench.shapesworld import Bench, Pictures, World
from reward_guidance.tests.bench.shapesworld_network import Collector, first, numbers, prepared
from reward_guidance.tests.harness.environment import cache
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.shapesworld import world
from torch import Tensor, nn

VALIDATION_SEED, TEST_SEED = 777, 0
SHAPE = 16, 8, 8


# --- counting


class Tally(Counter):
    """Passes of pictures through modules, by the module's name, and CPU seconds under `seconds`."""

    @contextmanager
    def counting(self, **modules: nn.Module) -> Iterator[None]:
        hooks = [module.register_forward_hook(self.counter(name.rstrip("_"))) for name, module in modules.items()]
        began = time.process_time()
        yield
        self["seconds"] += time.process_time() - began
        for hook in hooks:
            hook.remove()

    def counter(self, name: str) -> Callable:
        def count(_, inputs, output) -> None:
            rows = len(inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0])
            self[name] += rows
            made = output[0] if isinstance(output, tuple) else output
            if made.requires_grad:
                self[f"{name} backward"] += rows

        return count

    def times(self, factor: float) -> "Tally":
        return Tally({name: count * factor for name, count in self.items()})

    def plus(self, other: "Tally") -> "Tally":
        return Tally({name: self[name] + other[name] for name in self | other})

    def flops(self, prices: dict[str, float]) -> float:
        return sum(count * prices[name] for name, count in self.items() if name != "seconds")


def parts(world_: World) -> dict[str, nn.Module]:
    return {"model": world_.pipeline.model.model.diffusion_model, "decoder": world_.pipeline.decoder, "reward": world_.reward}


# --- judging


@dataclass(frozen=True)
class Judge:
    """Held-out pictures of every prompt, always from the same noise."""

    world: World
    per_prompt: int

    def __call__(self, model: ModelPatcher) -> tuple[float, float]:
        """Reward and held-out reward, standardized."""
        pictures = Pictures.of(self.world, self.world.sample(model, self.per_prompt, VALIDATION_SEED))
        return float(pictures.reward.mean()), float(pictures.heldout.mean())


# --- the finetune


@dataclass(frozen=True)
class Recipe:
    """How to climb a reward."""

    last: int = 1
    """Calls of the model with a graph, K of DRaFT-K; 0 is ReFL: one call, anywhere in the last half, whose D is judged."""
    learning_rate: float = 1e-3
    penalty: float = 0.0
    """Weight of ((D - D of the model as it was)/s)², s the posterior's standard deviation: the KL divergence of a step, by element."""
    rank: int = 8
    batch: int = 32
    steps: int = 120
    check_every: int = 10
    patience: int = 4
    """Checks without a better held-out reward after which it stops."""
    seed: int = 0

    def calls(self, of: int, rng: torch.Generator) -> range:
        """The calls that have a graph, of a sampling of so many."""
        if self.last:
            return range(of - self.last, of)
        chosen = int(torch.randint(of // 2, of, (1,), generator=rng))
        return range(chosen, chosen + 1)


RECIPES = {
    "draft1": Recipe(),
    "draft1-kl": Recipe(penalty=1.0),
    "draft2": Recipe(last=2),
    "draft4": Recipe(last=4),
    "refl": Recipe(last=0),
    "refl-kl": Recipe(last=0, penalty=1.0),
}


@dataclass(frozen=True)
class Check:
    """What had been reached, and spent, at a step of a finetune."""

    step: int
    spent: Tally
    reward: float
    heldout: float


class Finetune:
    """A LoRA on every linear layer of the model's blocks, by ComfyUI's own adapter."""

    def __init__(self, world_: World, recipe: Recipe):
        self.world, self.recipe, self.tally = world_, recipe, Tally()
        self.model = world_.pipeline.model.clone()
        self.adapters = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            for name, layer in self.model.model.diffusion_model.named_modules():
                if isinstance(layer, nn.Linear) and "blocks" in name:
                    self.adapters.append(LoRAAdapter.create_train(layer.weight, recipe.rank, float(recipe.rank)))
                    self.model.add_weight_wrapper(f"diffusion_model.{name}.weight", self.adapters[-1])
        for module in parts(world_).values():
            module.requires_grad_(False)
        self.trained = [parameter for parameter in self.adapters.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, recipe.learning_rate, weight_decay=0.0)

    def run(self, judge: Judge) -> list[Check]:
        """Train until the held-out reward rises no more; leaves the model as it was at its best."""
        checks = [Check(0, Tally(), *judge(self.model))]
        best, kept = checks[0], copy.deepcopy(self.adapters.state_dict())
        for step in range(1, self.recipe.steps + 1):
            self.climb(step)
            if step % self.recipe.check_every:
                continue
            checks.append(Check(step, Tally(self.tally), *judge(self.model)))
            print(f"step {step}: reward {checks[-1].reward:.3f}, held out {checks[-1].heldout:.3f}, {self.tally['seconds']:.0f} s", file=sys.stderr, flush=True)
            if checks[-1].heldout > best.heldout:
                best, kept = checks[-1], copy.deepcopy(self.adapters.state_dict())
            if step - best.step >= self.recipe.patience * self.recipe.check_every:
                break
        self.adapters.load_state_dict(kept)
        return checks

    def climb(self, step: int) -> None:
        rng = generator(self.recipe.seed, step)
        order = torch.randperm(len(self.world.prompts), generator=rng)
        prompts = [self.world.prompts[i] for i in order.repeat(-(-self.recipe.batch // len(order)))[: self.recipe.batch]]
        noise = torch.randn(self.recipe.batch, *SHAPE, generator=rng)
        with self.tally.counting(**parts(self.world)), differentiable_model(self.model.model):
            latents, penalty = self.sample(prompts, noise, self.recipe.calls(self.world.steps, rng))
            pixels = self.world.pipeline.decode(latents).clamp(0, 1)
            reward = self.world.reward.standardize(evaluate(self.world.reward, pixels, prompts)).mean()
            (self.recipe.penalty * penalty - reward).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def sample(self, prompts: Sequence[str], noise: Tensor, graph: range) -> tuple[Tensor, Tensor]:
        """The last D (B,16,8,8) of Euler steps that end with those that have a graph, and the penalty."""
        found: list[Tensor] = []
        penalties = [torch.zeros(())]

        def sampler(model, x, sigmas, extra_args=None, **_):
            for i in range(graph.stop):
                with torch.set_grad_enabled(i in graph):
                    level = sigmas[i].expand(len(x))
                    denoised = model(x, level, **extra_args)
                    if i in graph and self.recipe.penalty:
                        with torch.no_grad(), self.left_out():
                            before = model(x, level, **extra_args)
                        penalties.append((denoised - before).square().mean() / Diffusion().posterior_variance(sigmas[i]))
                    x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            found.append(denoised)
            return x.detach()

        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", self.world.steps)
        conditions = [normal(condition) for condition in self.world.pipeline.conditions(prompts)]
        comfy.sample.sample_custom(
            self.model, noise, self.world.cfg, comfy.samplers.KSAMPLER(sampler), sigmas, *conditions, torch.zeros_like(noise), disable_pbar=True
        )
        return found[0], torch.stack(penalties).sum()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the model is as it was."""
        for adapter in self.adapters:
            adapter.alpha.data.zero_()
        yield
        for adapter in self.adapters:
            adapter.alpha.data.fill_(self.recipe.rank)


def normal(conditioning: list) -> list:
    """Of tensors that autograd may save."""
    [[context, extra]] = conditioning
    return [[context.clone(), {name: value.clone() for name, value in extra.items()}]]
