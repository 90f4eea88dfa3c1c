"""The only place that knows inference mode, model patchers and the hooks of ComfyUI's samplers."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count
from textwrap import shorten
from typing import Any, cast
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..guidance.errors import GuidanceError
from ..guidance.estimators import ESTIMATORS, Estimator, Jacobian, NotFiniteError, Settings
from ..guidance.files import Base, Card
from ..guidance.network import FORMS, GuidanceNetwork, Text
from ..guidance.prior import tilted_noise
from ..guidance.process import Diffusion, Flow, Process, column
from ..guidance.randomness import generator
from ..guidance.rewards import Reward, evaluate, judge, require_prompt
from .decoders import Decoder

_serial = count()
GRADIENT_KEY = "reward_guidance.gradient."
ROWS_KEY = "reward_guidance.rows"
"""Of transformer_options: which samples of the batch before these are, where a sampler resampled it."""


class GradientPatcher(comfy.model_patcher.ModelPatcher):
    """A small module that gradients flow through: always wholly on its device or wholly off it.

    It is moved outside inference mode, or every step would need other tensors in place of its weights.
    """

    @torch.inference_mode(False)
    def load(self, *args, **kwargs):
        return super().load(*args, **kwargs)

    @torch.inference_mode(False)
    def unpatch_model(self, *args, **kwargs):
        return super().unpatch_model(*args, **kwargs)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0


def manage(module: nn.Module) -> GradientPatcher:
    """Hand a module to ComfyUI's model management."""
    return GradientPatcher(module, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def precision(wanted: torch.dtype | None) -> Callable[[torch.dtype], torch.dtype]:
    """The precision to load weights in, from the one they are stored in: the wanted, or the stored where the device is fast at it."""
    device = comfy.model_management.get_torch_device()
    fast = {torch.float16: comfy.model_management.should_use_fp16, torch.bfloat16: comfy.model_management.should_use_bf16}

    def choose(stored: torch.dtype) -> torch.dtype:
        return wanted or (stored if stored in fast and fast[stored](device) else torch.float32)

    return choose


@dataclass(frozen=True)
class LoadedReward:
    """What travels along a REWARD link: the reward, and a patcher for each of its parts that has weights."""

    reward: Reward
    patchers: tuple[GradientPatcher, ...] = ()
    scored: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, init=False, compare=False, repr=False)
    """Pictures that are still around -> prompt -> what was said of them."""


def manage_reward(reward: Reward) -> LoadedReward:
    """Freeze a reward in evaluation mode, manage its weights, and let interrupts stop it between layers."""
    if not isinstance(reward, Reward):
        raise GuidanceError(f"manage_reward takes a Reward, not {shorten(repr(reward), 90)}; derive a class from Reward and give it an object of it.")
    if not 0 < reward.reference_std < math.inf:
        raise GuidanceError(f"{reward.name} has a reference_std of {reward.reference_std}; it must be the typical spread of its scores, above 0.")
    for module in reward.eval().requires_grad_(False).modules():
        module.register_forward_pre_hook(_stop_if_interrupted)
    return LoadedReward(reward, (manage(reward),) if any(True for _ in chain(reward.parameters(), reward.buffers())) else ())


def _stop_if_interrupted(*_) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def normal_weights(*modules: nn.Module) -> Iterator[None]:
    """Stand in for weights that were loaded under inference mode by normal tensors over the same memory.

    Autograd refuses to save inference tensors. Nothing is copied.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in chain.from_iterable(m.modules() for m in modules):
            for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        swapped.append((tensors, name, tensor))
                        tensors[name] = _alias(tensor)
        yield
    finally:
        for tensors, name, tensor in swapped:
            tensors[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def gradients(*modules: nn.Module) -> Iterator[None]:
    """Inside, autograd works through these modules although ComfyUI runs its prompts in inference mode."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted), normal_weights(*modules):
        yield


def as_here(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function in the inference and gradient modes of where this is called, wherever it is called itself."""
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(*arguments) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
            return function(*arguments)

    return run


@contextmanager
def differentiable_model(*models: nn.Module) -> Iterator[None]:
    """Inside, autograd also works through a diffusion model: pure torch kernels, in-place updates of saved tensors allowed."""
    within_another = comfy.model_management.in_training
    mutation = nullcontext() if within_another else torch.autograd.graph.allow_mutation_on_saved_tensors()  # which cannot be nested
    comfy.model_management.in_training = True
    try:
        with normal_weights(*models), mutation:
            yield
    finally:
        comfy.model_management.in_training = within_another


def models_of(guider) -> list[nn.Module]:
    """Every model that a guider holds: its own, ControlNets, and whatever else it asks."""
    held = chain.from_iterable(value if isinstance(value, list) else [value] for value in vars(guider).values())
    return [each.model for each in held if isinstance(each, comfy.model_patcher.ModelPatcher)]


def process_of(model_sampling) -> Process:
    """The noising process of a model, from the coordinates its sampler works in."""
    if isinstance(model_sampling, (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)):
        raise GuidanceError("Reward guidance needs a model that denoises from noise; this one maps picture to picture.")
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return Flow(noise_scale=float(getattr(model_sampling, "noise_scale", 1.0)))
    return Diffusion()


class LatentReward:
    """Model-space latents (B,C,H,W) or (B,C,T,H,W) -> standardized rewards (B,), differentiable.

    Of a video, `frames` evenly spaced latent frames are decoded one by one; the reward is their mean.
    """

    def __init__(self, loaded: LoadedReward, decoder: Decoder, prompt: str, frames: int = 3):
        require_prompt(loaded.reward, [prompt])
        if frames < 1:
            raise GuidanceError(f"At least 1 frame of a video must be scored, not {frames}.")
        self.loaded = loaded
        self.decoder = decoder
        self.prompt = prompt
        self.frames = frames
        self.modules = [loaded.reward, *decoder.modules]
        self.patchers = [*loaded.patchers, *map(manage, decoder.modules)]

    def __call__(self, latents: Tensor) -> Tensor:
        reward = self.loaded.reward
        if latents.requires_grad and not reward.differentiable:
            raise GuidanceError(f"{reward.name} has no gradient to guide by. Use it to choose among pictures, or guide by another reward.")
        # An estimator that takes the gradient looks at the end of its step whether all is finite.
        return self.score(latents, [self.prompt], judge if latents.requires_grad else evaluate)

    def score(self, latents: Tensor, prompts: Sequence[str], by: Callable[[Reward, Tensor, Sequence[str]], Tensor] = evaluate) -> Tensor:
        """The same for a prompt of each sample's own."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        pictures = self.pictures(latents)
        pixels = self.decoder.pixels(pictures)
        told = prompts if len(prompts) == 1 else [prompt for prompt in prompts for _ in range(len(pictures) // len(latents))]
        scores = self.loaded.reward.standardize(by(self.loaded.reward, pixels, told))
        return scores.view(len(latents), -1).mean(1)

    def pictures(self, latents: Tensor) -> Tensor:
        if latents.ndim == 4:
            return latents
        if latents.ndim != 5:
            raise GuidanceError(f"Reward guidance works on pictures and videos, not on latents of shape {tuple(latents.shape)}.")
        chosen = torch.linspace(0, latents.shape[2] - 1, min(self.frames, latents.shape[2])).round().long().tolist()
        return torch.stack([latents[:, :, frame] for frame in chosen], 1).flatten(0, 1)

    def activation_bytes(self, shape: torch.Size) -> int:
        """Rough memory of decoding and scoring a batch of latents, forward and backward."""
        pictures = shape[0] * (min(self.frames, shape[2]) if len(shape) == 5 else 1)
        return pictures * (self.decoder.activation_bytes(*shape[-2:]) + self.loaded.reward.activation_bytes)


def patchers_of(reward: LatentReward, held_out: LatentReward | None) -> list[GradientPatcher]:
    """Both see pictures through one decoder, which is to be loaded once."""
    return [*reward.patchers, *(held_out.loaded.patchers if held_out else ())]


def rewards_of(denoised: Tensor, rewards: Tensor, held_out: Callable[[Tensor], Tensor] | None) -> dict[str, list[float]]:
    """The series to report: the rewards of denoised latents, and what the held-out one says of them."""
    with torch.no_grad():
        return {"reward": rewards.tolist()} | ({"reward/held-out": held_out(denoised).tolist()} if held_out else {})


def with_room_for(rewards: Sequence[LatentReward | None], patcher: comfy.model_patcher.ModelPatcher, noise_shape: Sequence[int]) -> list[int]:
    """A shape with as many more samples as take the memory of scoring those of `noise_shape` by one reward after the other."""
    per_sample = patcher.model.memory_required([1, *noise_shape[1:]])
    extra = math.ceil(max(reward.activation_bytes(torch.Size(noise_shape)) for reward in rewards if reward) / per_sample)
    return [noise_shape[0] + extra, *noise_shape[1:]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is reported while a node runs: how far it is, and numbers for every sample. See reporting.py."""

    step: int
    steps: int
    series: Mapping[str, Sequence[float]]
    scattered: tuple[str, ...] = ()
    """The series whose i-th numbers are not of one sample throughout the run."""
    run: int = 0
    """Tells apart the runs that one reporter hears of."""


@dataclass(frozen=True, kw_only=True)
class Step(Progress):
    """One guided model call."""

    sigma: float
    model_calls: int


@dataclass
class Run:
    """One sampling run. Lives from the guider's outer_sample to its end."""

    estimator: Estimator
    first_sigma: float
    last_sigma: float
    sigmas: list[float]
    serial: int = field(default_factory=lambda: next(_serial))
    model_calls: int = 0
    judged: Tensor | None = None
    """The estimate whose rewards were told last."""
    rows: Tensor | None = None
    """Of the last resampling that the estimator heard of."""

    def hear(self, rows: Tensor | None) -> None:
        """Keep the estimator's state with its samples, once for each resampling."""
        if rows is not None and rows is not self.rows:
            self.rows = rows
            self.estimator.take(rows)

    def active(self, sigma: float) -> bool:
        return self.last_sigma < sigma <= self.first_sigma


def require_order(start: float, end: float) -> None:
    if not start <= end:
        raise GuidanceError(f"Guidance starts at {start} and ends at {end}: the start must not lie after the end.")


def require_samples(noise: Tensor, latent_shapes: Sequence | None) -> None:
    """Raise GuidanceError where there is nothing to guide, or more than one stream of it."""
    if 0 in noise.shape:
        raise GuidanceError(f"The latent is empty, of shape {tuple(noise.shape)}: there is nothing to sample.")
    if latent_shapes is not None and len(latent_shapes) > 1:
        raise GuidanceError("Reward guidance cannot score latents that hold several streams, such as video with audio.")


@dataclass(frozen=True, eq=False)
class RewardGuidance:
    """Reward guidance of one model: clone, attach, forget. All state lives in the run it belongs to."""

    reward: LatentReward
    estimator: str
    settings: Settings
    start: float = 0.0
    end: float = 1.0
    report: Callable[[Step], object] = lambda step: None
    held_out: LatentReward | None = None
    """Reported, not followed."""
    runs: "WeakKeyDictionary[object, Run]" = field(default_factory=WeakKeyDictionary)

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model that any sampler guides by the reward; the model itself where there is nothing to do."""
        if self.settings.strength == 0 or self.start == self.end:
            return model
        patched = model.clone(disable_dynamic=self.needs_model_gradient)
        key = f"{GRADIENT_KEY}{next(_serial)}"
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, self.prepare_sampling)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
        patched.set_additional_models(key, patchers_of(self.reward, self.held_out))
        return patched

    @property
    def needs_model_gradient(self) -> bool:
        return issubclass(ESTIMATORS[self.estimator], Jacobian)

    def prepare_sampling(self, executor, patcher, noise_shape, conds, *args, **kwargs):
        """Load the diffusion model with room left for what the reward needs."""
        kwargs["force_full_load"] = kwargs.get("force_full_load", False) or self.needs_model_gradient
        return executor(patcher, with_room_for([self.reward, self.held_out], patcher, noise_shape), conds, *args, **kwargs)

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, latent_shapes=None, **kwargs):
        """Begin with clean state and forget it at the end, however the run ends."""
        require_samples(noise, latent_shapes)
        guider = executor.class_obj
        self.runs.pop(guider, None)
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, latent_shapes=latent_shapes, **kwargs)
            self.warn_of_nothing(self.runs.get(guider))
            return out
        finally:
            self.runs.pop(guider, None)

    def warn_of_nothing(self, run: Run | None) -> None:
        if run is None or not run.estimator.moved:
            logging.warning(
                f"Reward guidance changed nothing: of {self.start:g} to {self.end:g} of the way from noise, this sampling has too few steps. "
                "The first of them only finds the direction, and with a denoise below 1 the sampling begins later on the way."
            )

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """D -> D_q for one model call."""
        guider = executor.class_obj
        model_options = {} if model_options is None else model_options
        run = self.runs.get(guider)
        if run is None:
            run = self.runs[guider] = self.begin(guider.inner_model.model_sampling, model_options, seed)
        run.hear(model_options.get("transformer_options", {}).get(ROWS_KEY))
        sigma = float(timestep.flatten()[0])

        def denoise(point: Tensor) -> Tensor:
            run.model_calls += 1
            return executor(point, timestep, model_options, seed)

        if not run.active(sigma):
            return denoise(x)
        denoised = self.guide(run, denoise, x, sigma, guider)
        self.record(run, sigma)
        return denoised

    def begin(self, model_sampling, model_options: dict, seed: int | None) -> Run:
        estimator = ESTIMATORS[self.estimator](process_of(model_sampling), self.reward, self.settings, generator(seed or 0))
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas", torch.zeros(1)).tolist()
        return Run(estimator, model_sampling.percent_to_sigma(self.start), model_sampling.percent_to_sigma(self.end), sigmas)

    def guide(self, run: Run, denoise, x: Tensor, sigma: float, guider) -> Tensor:
        plain_denoise = as_here(denoise)
        with ExitStack() as stack:
            stack.enter_context(gradients(*self.reward.modules))
            if self.needs_model_gradient:
                stack.enter_context(differentiable_model(guider.inner_model, *models_of(guider)))
                plain_denoise, x = denoise, x.clone()
            try:
                return run.estimator(plain_denoise, x, sigma)
            except NotFiniteError:
                self.reward(run.estimator.judged)  # names what is at fault
                raise

    def record(self, run: Run, sigma: float) -> None:
        """Tell of a step that looked at the rewards; both of them judge the same estimate."""
        estimator = run.estimator
        if estimator.judged is run.judged:
            return
        run.judged = estimator.judged
        steps = max(len(run.sigmas) - 1, 1)
        # Some samplers begin a little below the first sigma.
        step = min(sum(level > sigma * (1 + 1e-3) for level in run.sigmas) + 1, steps)
        series = rewards_of(estimator.judged, estimator.rewards, self.held_out)
        self.report(Step(step=step, steps=steps, series=series, run=run.serial, sigma=sigma, model_calls=run.model_calls))


def resampled(extra_args: dict, rows: Tensor) -> dict:
    """A sampler's arguments for the calls that follow a resampling; guidance hears of it."""
    options = extra_args.get("model_options", {})
    told = {**options.get("transformer_options", {}), ROWS_KEY: rows}
    return {**extra_args, "model_options": {**options, "transformer_options": told}}


@dataclass(frozen=True, eq=False)
class RewardBeside:
    """Loads a reward beside a model, for samplers that score on the way, and shows the model `chunk` samples at a time; 0 shows all."""

    reward: LatentReward
    chunk: int = 0
    held_out: LatentReward | None = None

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        patched = model.clone()
        key = f"reward_guidance.{next(_serial)}"
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, self.prepare_sampling)
        patched.set_additional_models(key, patchers_of(self.reward, self.held_out))
        if self.chunk:
            patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
        return patched

    def prepare_sampling(self, executor, patcher, noise_shape, conds, *args, **kwargs):
        shown = min(self.chunk or noise_shape[0], noise_shape[0])
        return executor(patcher, with_room_for([self.reward, self.held_out], patcher, [shown, *noise_shape[1:]]), conds, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        parts = zip(x.split(self.chunk), timestep.split(self.chunk), strict=True)
        return torch.cat([executor(part, level, model_options or {}, seed) for part, level in parts])


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """What travels along a GUIDANCE_NETWORK link."""

    network: GuidanceNetwork
    card: Card
    patcher: GradientPatcher

    def require(self, target: str, advice: str) -> None:
        """Raise GuidanceError where a network that tilts data is to tilt noise, or the other way round."""
        if self.card.base.target != target:
            raise GuidanceError(f"This guidance network tilts {self.card.base.target}, not {target}: use {advice}.")


def manage_network(network: GuidanceNetwork, card: Card) -> LoadedNetwork:
    return LoadedNetwork(network, card, manage(network))


def base_of(model: comfy.model_patcher.ModelPatcher, target: str = "data") -> Base:
    """What samples of a model belong to."""
    latents = model.get_model_object("latent_format")
    process = process_of(model.get_model_object("model_sampling"))
    return Base(type(model.model.model_config).__name__, type(latents).__name__, latents.latent_channels, process.name, target)


def name_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The file that a model was loaded from, and how much of it is patched, as by a LoRA: what tells its samples from those of another."""
    loading = getattr(model, "cached_patcher_init", None)
    file = os.path.basename(str(loading[1][0])) if loading else type(model.model).__name__
    strengths = [patch[0] for patches in model.patches.values() for patch in patches]
    return f"{file} with {len(strengths)} patches of strength {sum(strengths):g}" if strengths else file


def require_unguided(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raise GuidanceError for a model that Reward Guidance has patched: it goes from step to step and cannot be asked at any noise level."""
    if any(key.startswith(GRADIENT_KEY) for key in model.wrappers.get(WrappersMP.PREDICT_NOISE, {})):
        raise GuidanceError("Samples are collected from the model itself: connect it before Reward Guidance.")


def text_of(conditions: Sequence[dict]) -> Text:
    """The tokens (B,T,E) and the pooled text (B,P) of the first of a guider's conditions; widths are 0 where there is none."""
    first = conditions[0] if conditions else {}
    tokens, pooled = first.get("cross_attn"), first.get("pooled_output")
    batch = next((len(part) for part in (tokens, pooled) if part is not None), 1)
    none = Text.none(batch)
    return Text(none.tokens if tokens is None else tokens, none.pooled if pooled is None else pooled)


def text_of_conditioning(conditioning: list) -> Text:
    """The same of a CONDITIONING."""
    return text_of(comfy.sampler_helpers.convert_cond(conditioning))


def text_for(loaded: LoadedNetwork, text: Text, like: Tensor) -> Text:
    """The text as a network reads it beside latents (B,...). Raises GuidanceError where it comes from another text encoder."""
    wanted = loaded.network.architecture

    def part(tensor: Tensor, width: int) -> Tensor:
        if width and tensor.shape[-1] not in (0, width):
            family = loaded.card.base.model
            raise GuidanceError(
                f"This guidance network was made for {family} and its text of {width} channels, but the model is told {tensor.shape[-1]}."
            )
        known = tensor if tensor.shape[-1] == width else tensor.new_zeros(*tensor.shape[:-1], width)
        return comfy.utils.repeat_to_batch_size(known, len(like))

    return Text(part(text.tokens, wanted.tokens), part(text.pooled, wanted.pooled)).to(like.device)


@dataclass(frozen=True, eq=False)
class NetworkGuidance:
    """Guidance of one model by a trained network. It has no state."""

    loaded: LoadedNetwork
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model that any sampler guides; the model itself where there is nothing to do."""
        self.loaded.require("data", "Guided Noise or KSampler (Guidance Network)")
        self.loaded.card.base.require(base_of(model), "guidance network")
        if self.strength == 0 or self.start == self.end:
            return model
        patched = model.clone()
        key = f"reward_guidance.network.{next(_serial)}"
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
        patched.set_additional_models(key, [self.loaded.patcher])
        return patched

    def outer_sample(self, executor, noise, *args, latent_shapes=None, **kwargs):
        require_samples(noise, latent_shapes)
        return executor(noise, *args, latent_shapes=latent_shapes, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """D -> D_q for one model call."""
        guider, form = executor.class_obj, FORMS[self.loaded.card.form]
        sampling = guider.inner_model.model_sampling
        process = process_of(sampling)

        def denoise(point: Tensor) -> Tensor:
            return executor(point, timestep, {} if model_options is None else model_options, seed)

        # A batch may hold states of several noise levels, as where samples are collected.
        active = (sampling.percent_to_sigma(self.end) < timestep) & (timestep <= sampling.percent_to_sigma(self.start))
        if self.loaded.card.form == "potential":
            active &= (process.scale(timestep) >= Estimator.min_scale).all()
        if not active.any():
            return denoise(x)
        text = text_for(self.loaded, text_of(guider.conds.get("positive", ())), x)
        answer = as_here(denoise)
        with gradients(self.loaded.network):
            strength = self.strength * column(active.to(x), x)
            return form(self.loaded.network, process, answer, x.clone(), timestep.clone(), text, strength)


def tilt(loaded: LoadedNetwork, noise: Tensor, conditioning: list, steps: int, strength: float) -> Tensor:
    """Noise (B,...) -> noise from which a one-step generator makes pictures that are rewarded; on the device and in the dtype it came in."""
    loaded.require("noise", "Apply Guidance Network")
    if noise.shape[1] != loaded.card.base.channels:
        raise GuidanceError(
            f"This guidance network was made for {loaded.card.base.model} with {loaded.card.base.channels} latent channels, not {noise.shape[1]}."
        )
    if strength == 0:
        return noise
    comfy.model_management.load_models_gpu([loaded.patcher])
    moved = noise.to(loaded.patcher.load_device, torch.float32)
    text = text_for(loaded, text_of_conditioning(conditioning), moved)
    return tilted_noise(loaded.network, moved, text, steps, strength, loaded.card.form).to(noise)


@contextmanager
def trainable() -> Iterator[None]:
    """Inside, networks can be trained although ComfyUI runs its prompts in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def as_nodes_run() -> Iterator[None]:
    """Inside, all is as ComfyUI runs its prompts."""
    with torch.inference_mode():
        yield


def static_clone(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone that can be wholly on its device."""
    return model.clone(disable_dynamic=True)


@contextmanager
def training_through(model: comfy.model_patcher.ModelPatcher | None = None, reward: LatentReward | None = None) -> Iterator[None]:
    """Inside, outside of sampling, both are on their devices, and gradients flow through them and none into their weights.

    model: a static clone.
    """
    patchers, modules = (reward.patchers, reward.modules) if reward else ([], [])
    comfy.model_management.load_models_gpu([*([model] if model else []), *patchers], force_full_load=True)
    with normal_weights(*modules), differentiable_model(model.model.requires_grad_(False)) if model else nullcontext():
        yield


def room_for(needed: int) -> torch.device:
    """The device, with so many bytes free where that is possible."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(needed, device)
    return device


def as_many_as_fit(model: comfy.model_patcher.ModelPatcher, shape: Sequence[int]) -> int:
    """How many samples of that shape the model's device has memory for at once, by ComfyUI's own estimate, with CFG; at least 1."""
    weights_to_come = model.model_size() - model.loaded_size()
    free = comfy.model_management.get_free_memory(model.load_device) - weights_to_come - comfy.model_management.extra_reserved_memory()
    return max(1, int(free // model.model.memory_required([2, *shape[1:]])))
