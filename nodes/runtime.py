"""The only place that knows inference mode, model patchers and the hooks of ComfyUI's samplers."""

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count
from textwrap import shorten
from typing import Any, cast
from weakref import WeakKeyDictionary

import comfy.cli_args
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
from ..guidance.estimators import ESTIMATORS, Estimator, NotFiniteError, Settings
from ..guidance.files import Base, Card
from ..guidance.inpainting import Inpainting
from ..guidance.network import FORMS, GuidanceNetwork, Text
from ..guidance.prior import tilted_noise
from ..guidance.process import Diffusion, Flow, Process, column
from ..guidance.randomness import generator
from ..guidance.rewards import Reward, RewardError, evaluate, judge, require_prompt
from .decoders import Decoder, static_clone
from .prompts import plain

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
    """A normal tensor over the same memory. A subclass stays what it is: quantized weights hold their numbers in tensors of their own."""
    kind: Any = type(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return kind.__tensor_unflatten__({name: _alias(getattr(tensor, name)) for name in names}, context, tensor.size(), tensor.stride())
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if kind not in (Tensor, nn.Parameter):
        alias = alias.as_subclass(kind)
        vars(alias).update(vars(tensor))
    return alias


def normal(values: Any) -> Any:
    """Tensors, and those in a dictionary, as autograd can save them. Nothing is copied but the dictionary."""
    if isinstance(values, dict):
        return {name: normal(value) if isinstance(value, Tensor) else value for name, value in values.items()}
    return _alias(values) if values.is_inference() else values


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


_inside_differentiable_model = False


@contextmanager
def differentiable_model(*models: nn.Module, instead: str = "another model") -> Iterator[None]:
    """Inside, autograd also works through a diffusion model: pure torch kernels, in-place updates of saved tensors allowed, and no compiler
    that reuses memory which the backward pass needs.

    Raises GuidanceError, which advises `instead`, where a kernel of the model has no gradient.
    """
    global _inside_differentiable_model
    within_another = _inside_differentiable_model
    mutation = nullcontext() if within_another else torch.autograd.graph.allow_mutation_on_saved_tensors()  # which cannot be nested
    _inside_differentiable_model = True
    try:
        switches = switched(comfy.model_management, "in_training", True), switched(comfy.cli_args.args, "disable_comfy_compiler", True)
        with switches[0], switches[1], normal_weights(*models), mutation:
            yield
    except (RuntimeError, NotImplementedError) as error:
        if not NO_GRADIENT.search(str(error)):
            raise
        reason = shorten(str(error), 160, placeholder=" ...")
        raise GuidanceError(f"A part of this model has no gradient, which is needed here: choose {instead}. PyTorch: {reason}") from error
    finally:
        _inside_differentiable_model = within_another


NO_GRADIENT = re.compile(
    "no autograd formula|derivative for|does not require grad|does not have a grad_fn|[Ii]nference tensor|in-?place operation|version counter|"
    "its data is not allocated"
)
"""In PyTorch's messages where an operation has no backward pass, or not in the way that a model uses it."""


@contextmanager
def switched(holder: Any, name: str, value: object) -> Iterator[None]:
    """Inside, a switch of ComfyUI stands at another value; of a core that does not have it yet, nothing changes."""
    if not hasattr(holder, name):
        yield
        return
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def trains_elsewhere() -> bool:
    """Whether another node trains the model, such as Train LoRA: then its predictions are not samples and must not be guided."""
    return comfy.model_management.in_training and not _inside_differentiable_model


def models_of(guider) -> list[nn.Module]:
    """Every model that a guider holds: its own, ControlNets, and whatever else it asks."""
    held = chain.from_iterable(value if isinstance(value, list) else [value] for value in vars(guider).values())
    return [each.model for each in held if isinstance(each, comfy.model_patcher.ModelPatcher)]


def process_of(model_sampling, shape: Sequence[int]) -> Process:
    """The noising process of a model for latents of this shape, from the coordinates its sampler works in."""
    require_noise_to_picture(model_sampling)
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        pure = model_sampling.noise_scaling(torch.ones(()), torch.ones(tuple(shape)), torch.zeros(tuple(shape)))
        return Flow(noise_scale=float(pure.flatten()[0]))
    return Diffusion()


def require_noise_to_picture(model_sampling) -> None:
    """Raise GuidanceError for models that begin with a picture instead of noise."""
    if any(kind.__name__.startswith("IMG_TO_IMG") for kind in type(model_sampling).__mro__):
        raise GuidanceError("Reward guidance needs a model that denoises from noise; this one maps picture to picture.")


class LatentReward:
    """Model-space latents (B,C,H,W) or (B,C,T,H,W) -> standardized rewards (B,), differentiable.

    Of a video, `frames` evenly spaced latent frames are decoded one by one; the reward is their mean.
    """

    def __init__(self, loaded: LoadedReward, decoder: Decoder, prompt: str, frames: int = 3):
        require_prompt(loaded.reward, [plain(prompt)])
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
        frames = 1 if len(prompts) == 1 else len(pictures) // len(latents)
        told = [plain(prompt) for prompt in prompts for _ in range(frames)]
        try:
            scores = by(self.loaded.reward, pixels, told)
        except RewardError:
            self.require_finite(pictures, pixels)
            raise
        return self.loaded.reward.standardize(scores).view(len(latents), -1).mean(1)

    def require_finite(self, latents: Tensor, pixels: Tensor) -> None:
        """Raise GuidanceError where the model or the decoder is at fault. It waits for a GPU, so it is for scores that were refused."""
        if not latents.isfinite().all():
            raise GuidanceError(
                "The model's estimate is not a finite number, so no reward can score it: the model's file is damaged, or its precision is too "
                "low. Load the model in another precision."
            )
        if not pixels.isfinite().all():
            raise GuidanceError(
                f"The decoder {self.decoder.name} made pixels that are not finite numbers: its file is damaged, or its precision is too low. "
                "Replace the file, choose another decoder, or start ComfyUI with --fp32-vae."
            )

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


@dataclass(kw_only=True)
class SamplingRun:
    """What guidance keeps while one sampler runs."""

    process: Process
    first_sigma: float
    last_sigma: float
    noise_mask: "NoiseMask | None" = None
    inpainting: Inpainting | None = None
    """Of the present call of the model."""

    def active(self, sigma: Any) -> Any:
        return (self.last_sigma < sigma) & (sigma <= self.first_sigma)

    def moved(self, x: Tensor, point: Tensor) -> Tensor:
        """The model's input: x moved to `point`, but for what a noise mask keeps."""
        return point if self.inpainting is None else self.inpainting.moved(x, point)

    def blended(self, denoised: Tensor) -> Tensor:
        """The picture that a person gets of a denoised latent."""
        return denoised if self.inpainting is None else self.inpainting.blended(denoised)


@dataclass(frozen=True)
class NoiseMask:
    """A noise mask as a sampler applies it."""

    mask: Tensor
    """(B,...) 1 where noise is sampled."""
    latent: Tensor
    """(B,...) kept, in the model's space."""
    sigmas: Tensor

    def at(self, guider, timestep: Tensor, model_options: dict) -> Inpainting:
        """At one call of the model: nodes such as Differential Diffusion change the mask from step to step."""
        mask = self.mask
        if "denoise_mask_function" in model_options:
            mask = model_options["denoise_mask_function"](timestep, mask, extra_options={"model": guider, "sigmas": self.sigmas})
        with torch.inference_mode(False):
            return Inpainting(normal(mask), normal(self.latent))


@dataclass(kw_only=True)
class Run(SamplingRun):
    """One sampling run that a reward guides."""

    estimator: Estimator
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
class SamplerHooks:
    """Hooks of a model's clone that change its predictions while a sampler runs, and at no other time. All state lives in the run it belongs to."""

    runs: "WeakKeyDictionary[object, Any]" = field(default_factory=WeakKeyDictionary, init=False)

    def hook(self, patched: comfy.model_patcher.ModelPatcher, key: str) -> None:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, self.sampler_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)

    def outer_sample(self, executor, noise, *args, latent_shapes=None, **kwargs):
        """Forget the run at its end, however it ends."""
        require_samples(noise, latent_shapes)
        guider = executor.class_obj
        try:
            out = executor(noise, *args, latent_shapes=latent_shapes, **kwargs)
            self.warn(self.runs.get(guider))
            return out
        finally:
            self.runs.pop(guider, None)

    def warn(self, run: Any) -> None:
        """Log what went otherwise than a person would expect."""
        if trains_elsewhere():
            logging.warning("The model is trained by another node: meanwhile its guidance is off.")

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs):
        """Begin a run."""
        run = self.begin(guider, noise.shape, extra_args.get("model_options", {}), extra_args.get("seed"))
        if denoise_mask is not None:
            run.noise_mask = NoiseMask(denoise_mask, latent_image, sigmas)
        self.runs[guider] = run
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """D -> D_q for one model call."""
        guider, model_options = executor.class_obj, {} if model_options is None else model_options
        if trains_elsewhere():
            return executor(x, timestep, model_options, seed)
        if guider not in self.runs:  # a guider of its own make may call no sampler
            self.runs[guider] = self.begin(guider, x.shape, model_options, seed)
        run = self.runs[guider]
        if run.noise_mask is not None:
            run.inpainting = run.noise_mask.at(guider, timestep, model_options)
        return self.predict(run, guider, executor, x, timestep, model_options, seed)

    def begin(self, guider, shape: torch.Size, model_options: dict, seed: int | None) -> Any:
        """The state of a run for latents of this shape."""
        raise NotImplementedError

    def predict(self, run: Any, guider, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None) -> Tensor:
        """D_q (B,...) of x (B,...) at noise levels (B,)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class RewardGuidance(SamplerHooks):
    """Reward guidance of one model: clone, attach, forget."""

    reward: LatentReward
    estimator: str
    settings: Settings
    start: float = 0.0
    end: float = 1.0
    report: Callable[[Step], object] = lambda step: None
    held_out: LatentReward | None = None
    """Reported, not followed."""

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model that any sampler guides by the reward; the model itself where there is nothing to do."""
        if self.settings.strength == 0 or self.start == self.end:
            return model
        require_noise_to_picture(model.get_model_object("model_sampling"))
        patched = static_clone(model, "The estimator jacobian", ONE_CALL) if self.kind.model_gradient else model.clone()
        key = f"{GRADIENT_KEY}{next(_serial)}"
        self.hook(patched, key)
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, self.prepare_sampling)
        patched.set_additional_models(key, patchers_of(self.reward, self.held_out))
        return patched

    @property
    def kind(self) -> type[Estimator]:
        return ESTIMATORS[self.estimator]

    def prepare_sampling(self, executor, patcher, noise_shape, conds, *args, **kwargs):
        """Load the diffusion model with room left for what the reward needs."""
        kwargs["force_full_load"] = kwargs.get("force_full_load", False) or self.kind.model_gradient
        return executor(patcher, with_room_for([self.reward, self.held_out], patcher, noise_shape), conds, *args, **kwargs)

    def warn(self, run: Run | None) -> None:
        super().warn(run)
        if not trains_elsewhere() and (run is None or not run.estimator.moved):
            logging.warning(
                f"Reward guidance changed nothing: of {self.start:g} to {self.end:g} of the way from noise, this sampling has too few steps. "
                "The first of them only finds the direction, and with a denoise below 1 the sampling begins later on the way."
            )

    def begin(self, guider, shape, model_options, seed):
        sampling = guider.inner_model.model_sampling
        process = process_of(sampling, shape)
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas", torch.zeros(1)).tolist()
        run = Run(
            process=process,
            first_sigma=sampling.percent_to_sigma(self.start),
            last_sigma=sampling.percent_to_sigma(self.end),
            sigmas=sigmas,
            estimator=self.kind(process, lambda denoised: self.reward(run.blended(denoised)), self.settings, generator(seed or 0)),
        )
        return run

    def predict(self, run, guider, executor, x, timestep, model_options, seed):
        options = model_options.get("transformer_options", {})
        run.hear(options.get(ROWS_KEY))
        sigma = one_level(timestep)
        if not run.active(sigma):
            return executor(x, timestep, model_options, seed)
        require_one_call(self.estimator, options)

        def denoise(point: Tensor) -> Tensor:
            run.model_calls += 1
            return executor(run.moved(x, point), timestep, model_options, seed)

        plain_denoise = as_here(denoise)
        with gradients(*self.reward.modules):
            if not self.kind.model_gradient:
                denoised = self.guide(run, plain_denoise, x, sigma)
            else:
                x, timestep, model_options = x.clone(), normal(timestep), {**model_options, "transformer_options": normal(options)}
                with differentiable_model(guider.inner_model, *models_of(guider), instead=f"the estimator {ONE_CALL}"):
                    denoised = self.guide(run, denoise, x, sigma)
        self.record(run, sigma)
        return denoised

    def guide(self, run: Run, denoise: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
        try:
            return run.estimator(denoise, x, sigma)
        except NotFiniteError:
            self.reward(run.blended(run.estimator.judged))  # names what is at fault
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
        series = rewards_of(run.blended(estimator.judged), estimator.rewards, self.held_out)
        self.report(Step(step=step, steps=steps, series=series, run=run.serial, sigma=sigma, model_calls=run.model_calls))


ONE_CALL = "shift"
"""The estimator that works with every model."""


def one_level(timestep: Tensor) -> float:
    """The noise level that all samples of a batch (B,) have. Raises GuidanceError where they differ."""
    levels = timestep.flatten().tolist()
    if len(set(levels)) > 1:
        raise GuidanceError("Reward guidance needs one noise level for all samples of a batch; this sampler gives each its own.")
    return levels[0]


def require_one_call(estimator: str, transformer_options: dict) -> None:
    """Raise GuidanceError for an estimator that a model which remembers its calls cannot serve, as Causal Wan remembers earlier frames."""
    kind = ESTIMATORS[estimator]
    if "ar_state" in transformer_options and (kind.model_gradient or kind.model_calls > 1):
        why = "backpropagates through the model" if kind.model_gradient else f"calls the model {kind.model_calls} times at each step"
        raise GuidanceError(f"This model remembers the frames of every call, but the estimator {estimator} {why}: choose the estimator {ONE_CALL}.")


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


NOMINAL = 64
"""Side of a latent of no certain size."""


def base_of(model: comfy.model_patcher.ModelPatcher, target: str = "data", shape: Sequence[int] = ()) -> Base:
    """What samples of a model belong to. shape: of a latent (C,...), on which the scale of the noise may depend."""
    latents = model.get_model_object("latent_format")
    size = (1,) * (latents.latent_dimensions - 2) + (NOMINAL, NOMINAL)
    process = process_of(model.get_model_object("model_sampling"), (1, *(shape or (latents.latent_channels, *size))))
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
class NetworkGuidance(SamplerHooks):
    """Guidance of one model by a trained network."""

    loaded: LoadedNetwork
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model that any sampler guides; the model itself where there is nothing to do."""
        self.loaded.require("data", "Guided Noise or KSampler (Guidance Network)")
        self.loaded.card.base.require(base_of(model, shape=self.loaded.card.shape), "guidance network")
        if self.strength == 0 or self.start == self.end:
            return model
        patched = model.clone()
        key = f"reward_guidance.network.{next(_serial)}"
        self.hook(patched, key)
        patched.set_additional_models(key, [self.loaded.patcher])
        return patched

    def begin(self, guider, shape, model_options, seed):
        sampling = guider.inner_model.model_sampling
        bounds = {"first_sigma": sampling.percent_to_sigma(self.start), "last_sigma": sampling.percent_to_sigma(self.end)}
        return SamplingRun(process=process_of(sampling, shape), **bounds)

    def predict(self, run, guider, executor, x, timestep, model_options, seed):
        form, process = FORMS[self.loaded.card.form], run.process

        def denoise(point: Tensor) -> Tensor:
            return executor(run.moved(x, point), timestep, model_options, seed)

        active = run.active(timestep)  # a batch may hold states of several noise levels, as where samples are collected
        if self.loaded.card.form == "potential":
            active &= (process.scale(timestep) >= Estimator.min_scale).all()
        if not active.any():
            return executor(x, timestep, model_options, seed)
        text = text_for(self.loaded, text_of(guider.conds.get("positive", ())), x)
        answer = as_here(denoise)
        with gradients(self.loaded.network):
            strength = self.strength * column(active.to(x), x)
            return form(self.loaded.network, process, answer, x.clone(), timestep.clone(), text, strength)


def tilt(loaded: LoadedNetwork, noise: Tensor, conditioning: list, steps: int, strength: float, mask: Tensor | None = None) -> Tensor:
    """Noise (B,...) -> noise from which a one-step generator makes pictures that are rewarded; on the device and in the dtype it came in.

    mask: the noise mask of a LATENT; where it keeps the latent, the noise stays what it was.
    """
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
    tilted = tilted_noise(loaded.network, moved, text, steps, strength, loaded.card.form).to(noise)
    return tilted if mask is None else torch.lerp(noise, tilted, comfy.utils.reshape_mask(mask, noise.shape).to(noise))


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


@contextmanager
def training_through(
    model: comfy.model_patcher.ModelPatcher | None = None, reward: LatentReward | None = None, instead: str = ""
) -> Iterator[None]:
    """Inside, outside of sampling, both are on their devices, and gradients flow through them and none into their weights.

    model: a static clone. instead: what to choose where the model has no gradient.
    """
    patchers, modules = (reward.patchers, reward.modules) if reward else ([], [])
    comfy.model_management.load_models_gpu([*([model] if model else []), *patchers], force_full_load=True)
    with normal_weights(*modules), differentiable_model(model.model.requires_grad_(False), instead=instead) if model else nullcontext():
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
