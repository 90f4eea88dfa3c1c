"""Gradients through a whole diffusion model: every kind of weights and of patches either has them, or a sentence that says what to choose."""

import importlib
import json
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.cli_args
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.estimators import Settings
from reward_guidance.guidance.rewards import ImageStatistic
from reward_guidance.nodes.wiring.autograd import differentiable_model, normal_weights, static_clone
from reward_guidance.nodes.wiring.decoders import LatentRGB
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.loaded import LoadedReward
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.standins import formats

SD15, FLUX, QUANTIZED = "sd15", "flux", "flux in scaled fp8"
CHANNELS = {SD15: 4, FLUX: 16, QUANTIZED: 16}
PATCHES = (
    ("cfg", "CFGNorm"),
    ("cfg", "CFGZeroStar"),
    ("apg", "APG"),
    ("tcfg", "TCFG"),
    ("mahiro", "Mahiro"),
    ("eps", "EpsilonScaling"),
    ("pag", "PerturbedAttentionGuidance"),
    ("freelunch", "FreeU_V2"),
    ("hypertile", "HyperTile"),
    ("easycache", "EasyCacheNode"),
    ("model_advanced", "RescaleCFG"),
    ("model_advanced", "ModelSamplingDiscrete"),
)


def text(seed):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, 768, generator=draw), {"pooled_output": torch.randn(1, 768, generator=draw)}]]


@pytest.fixture(scope="module")
def loaded():
    """As loaders make them: inside inference mode."""
    folder = models.format_standins()
    with torch.inference_mode():
        checkpoint = comfy.sd.load_checkpoint_guess_config(
            str(folder / formats.SD15), output_vae=False, output_clip=False
        )
        flux = comfy.utils.load_torch_file(str(folder / formats.FLUX))
        return {
            SD15: checkpoint[0],
            FLUX: comfy.sd.load_diffusion_model_state_dict(dict(flux)),
            QUANTIZED: comfy.sd.load_diffusion_model_state_dict(scaled_fp8(flux)),
        }


def scaled_fp8(state):
    """The linear layers of the blocks in fp8, with a scale for each, as ComfyUI's quantized checkpoints have them."""
    found = {}
    for name, tensor in state.items():
        found[name] = tensor
        if name.endswith(".weight") and "blocks" in name and tensor.ndim == 2:
            scale = tensor.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
            layer = name.removesuffix(".weight")
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale"] = scale
            found[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8
            )
    return found


def guided(model, estimator="jacobian"):
    with torch.inference_mode(False):
        reward = LatentReward(
            LoadedReward(ImageStatistic("brightness")), LatentRGB(model.get_model_object("latent_format")), ""
        )
        return RewardGuidance(reward, estimator, Settings(strength=4.0, cap=2.0)).attach(model)


def sample(model, channels, cfg=4.0):
    latent = torch.zeros(1, channels, 8, 8)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 1)
        return comfy.sample.sample(
            model, noise, 2, cfg, "euler", "simple", text(0), text(1), latent, seed=1, disable_pbar=True
        )


def brightness(model, latents):
    decoder = LatentRGB(model.get_model_object("latent_format"))
    return float(ImageStatistic("brightness")(decoder.pixels(model.model.process_latent_in(latents.clone())), [""]))


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
@pytest.mark.parametrize("name", [SD15, FLUX, QUANTIZED])
def test_every_kind_of_weights_is_guided(loaded, name, estimator):
    model = loaded[name]
    plain, moved = (sample(each, CHANNELS[name], 1.0) for each in (model, guided(model, estimator)))
    assert brightness(model, moved) > brightness(model, plain) + 1e-3
    assert torch.equal(sample(model, CHANNELS[name], 1.0), plain)


@pytest.mark.parametrize("first", ["patch", "guidance"])
@pytest.mark.parametrize(("file", "node"), PATCHES, ids=[node for _, node in PATCHES])
def test_comfyuis_own_patches_of_a_model(loaded, file, node, first):
    kind = getattr(importlib.import_module(f"comfy_extras.nodes_{file}"), node)
    patch = lambda model: patched(kind, model)  # noqa: E731
    steps = (patch, guided) if first == "patch" else (guided, patch)
    model = loaded[SD15]
    for step in steps:
        model = step(model)
    out = sample(model, CHANNELS[SD15])
    assert out.isfinite().all()
    assert (out - sample(patch(loaded[SD15]), CHANNELS[SD15])).abs().max() > 1e-4


@torch.inference_mode()
def patched(kind, model):
    if not hasattr(kind, "define_schema"):
        widgets = {name: spec for name, spec in kind.INPUT_TYPES()["required"].items() if name != "model"}
        options = {name: spec[1]["default"] if len(spec) > 1 else spec[0][0] for name, spec in widgets.items()}
        return getattr(kind(), kind.FUNCTION)(model=model, **options)[0]
    inputs = [each for each in kind.define_schema().inputs if each.id != "model" and not each.optional]
    out = kind.execute(model, **{each.id: each.options[0] if each.default is None else each.default for each in inputs})
    return (out if isinstance(out, tuple) else out.result)[0]


class Unfinished(torch.autograd.Function):
    """A kernel without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("the derivative for 'fused_rope' is not implemented.")


def test_a_kernel_without_a_gradient_is_named_and_shift_advised(loaded):
    model = loaded[SD15].clone()
    model.set_model_unet_function_wrapper(
        lambda apply, options: Unfinished.apply(apply(options["input"], options["timestep"], **options["c"]))
    )
    with pytest.raises(GuidanceError, match="no gradient.*choose the estimator shift.*fused_rope"):
        sample(guided(model), 4)
    assert sample(guided(model, "shift"), 4).isfinite().all()
    assert not comfy.model_management.in_training


def test_other_errors_of_a_model_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), differentiable_model(instead="nothing"):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("before", [False, True])
def test_a_compiler_that_reuses_memory_is_off_where_gradients_flow(monkeypatch, before):
    """Newer ComfyUI has one."""
    monkeypatch.setattr(comfy.cli_args.args, "disable_comfy_compiler", before, raising=False)
    with pytest.raises(ZeroDivisionError), differentiable_model(instead="nothing"):
        assert comfy.cli_args.args.disable_comfy_compiler is True
        raise ZeroDivisionError
    assert comfy.cli_args.args.disable_comfy_compiler is before


class Packed(torch.Tensor):
    """As GGUF's loaders have them: a tensor that carries what its numbers mean."""


def test_weights_of_a_class_of_their_own_keep_it_and_what_they_carry():
    with torch.inference_mode():
        layer = torch.nn.Linear(3, 3)
        layer.weight = torch.nn.Parameter(torch.ones(3, 3).as_subclass(Packed), requires_grad=False)
        layer.weight.tensor_type = "Q4_0"
    original = layer.weight
    with torch.inference_mode(False), normal_weights(layer):
        assert type(layer.weight) is Packed
        assert layer.weight.tensor_type == "Q4_0"
        assert not layer.weight.is_inference()
        assert layer.weight.data_ptr() == original.data_ptr()
    assert layer.weight is original


def test_a_model_that_cannot_be_loaded_twice_is_refused_in_a_sentence():
    model = SimpleNamespace(is_dynamic=lambda: True, cached_patcher_init=None)
    with pytest.raises(GuidanceError, match="cannot load it a second time.*choose the estimator shift"):
        static_clone(model, "The estimator jacobian", "the estimator shift")
