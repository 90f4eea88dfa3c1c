"""Nodes that sample with a guidance network, and keep it in a file."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..guidance.errors import GuidanceError, quoted, short
from ..guidance.network.file import load_network, save_network
from .wiring.inputs import NETWORK, TILTS, interval_inputs, noise_steps_input, sampler_inputs, strength_input
from .wiring.latents import sampled, samples_of
from .wiring.loaded import LoadedNetwork, manage_network
from .wiring.node import prepares_inputs
from .wiring.patch_network import NetworkGuidance, followed, tilt
from .wiring.sampling import Sampling
from .wiring.watching import ReadFiles

FOLDER = "guidance_networks"
CATEGORY = "reward guidance/network"
LONGEST = 200
"""Bytes of a file's name, and of a folder's."""
ATTEMPTS = 100
"""To find a number that no other server takes."""
_read = ReadFiles()


@prepares_inputs
class LoadNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadNetwork",
            display_name="Load Guidance Network",
            category=CATEGORY,
            description="Loads a guidance network from models/guidance_networks. What it was trained for, it says itself; for a model of another "
            "family it is refused.",
            search_aliases=["reward network", "guidance model", "alignment network"],
            inputs=[
                io.Combo.Input(
                    "network_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file that Save Guidance Network or the command line wrote into models/guidance_networks.",
                )
            ],
            outputs=[
                NETWORK.Output(
                    display_name="network",
                    tooltip="For Apply Guidance Network, KSampler (Guidance Network) and Guided Noise.",
                ),
                io.String.Output(display_name="report", tooltip="What the network was trained for, and on what."),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    def execute(cls, network_name: str) -> io.NodeOutput:
        path = network_path(network_name)
        network, card = load_network(path)
        _read.remember([path])
        return io.NodeOutput(manage_network(network, card), card.describe(), ui=ui.PreviewText(card.describe()))

    @classmethod
    def fingerprint_inputs(cls, **choices) -> int:
        return _read.fingerprint()


def network_path(name: str | None) -> Path:
    if (path := folder_paths.get_full_path(FOLDER, name) if name else None) is None:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        raise GuidanceError(
            f"There is no guidance network {quoted(name or '')} in {folder}: put it there, press R, and choose it."
        )
    return Path(path)


@prepares_inputs
class SaveNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceSaveNetwork",
            display_name="Save Guidance Network",
            category=CATEGORY,
            description="Saves a guidance network into models/guidance_networks, under a new number each time.",
            search_aliases=["export guidance network"],
            inputs=[
                NETWORK.Input("network", tooltip="The network to save."),
                io.String.Input(
                    "filename_prefix",
                    default="guidance",
                    optional=True,
                    tooltip="How the file is called, before its number; it may begin with subfolders: styles/blue becomes styles/blue_00001_.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, network: LoadedNetwork, filename_prefix: str) -> io.NodeOutput:
        path = save_under(filename_prefix, network)
        return io.NodeOutput(ui=ui.PreviewText(f"{path}\n{network.card.describe()}"))


def save_under(prefix: str, network: LoadedNetwork) -> Path:
    """Save in models/guidance_networks, by the first number that is free. Another server may take a number in the same moment."""
    for _ in range(ATTEMPTS):
        with suppress(FileExistsError):
            save_network(path := free_path(prefix), network.network, network.card, new=True)
            return path
    raise GuidanceError(f"No number after {quoted(prefix)} is free: write another filename_prefix.")


def free_path(prefix: str) -> Path:
    """A path in models/guidance_networks that no file has."""
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    parts = Path(prefix).parts
    short_enough = parts and max(len(part.encode(errors="replace")) for part in parts) <= LONGEST
    if not short_enough or "\0" in prefix or not (root / prefix).resolve().is_relative_to(root.resolve()):
        raise GuidanceError(
            f"{quoted(prefix)} is not a name for a file in models/{FOLDER}: write a short one without leading slashes and '..'."
        )
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    except OSError as error:
        raise GuidanceError(
            f"{quoted(prefix)} cannot be a file in models/{FOLDER} ({short(error.strerror)}): write another name."
        ) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


@prepares_inputs
class ApplyNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceApplyNetwork",
            display_name="Apply Guidance Network",
            category=CATEGORY,
            description="Makes a model follow what a guidance network learned, with any sampler and guider and at the model calls of the plain one.",
            search_aliases=["guidance network", "reward network", "alignment"],
            inputs=[
                io.Model.Input("model", tooltip="The model, of the family that the network was trained for."),
                NETWORK.Input("network", tooltip="A network that tilts data."),
                strength_input(),
                *interval_inputs("guidance", "0.7 to 1"),
            ],
            outputs=[io.Model.Output(tooltip="The model, guided by the network.")],
        )

    @classmethod
    def execute(
        cls, model, network: LoadedNetwork, strength: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        return io.NodeOutput(NetworkGuidance(network, strength, start_percent, end_percent).attach(model))


@dataclass(frozen=True)
class GuidedNoise:
    """What travels along a NOISE link."""

    network: LoadedNetwork
    conditioning: list
    seed: int
    steps: int
    strength: float

    def generate_noise(self, input_latent: dict) -> Tensor:
        noise = comfy.sample.prepare_noise(samples_of(input_latent), self.seed, input_latent.get("batch_index"))
        return tilt(self.network, noise, self.conditioning, self.steps, self.strength, input_latent.get("noise_mask"))


@prepares_inputs
class Noise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceNoise",
            display_name="Guided Noise",
            category=CATEGORY,
            description="Noise from which a one-step generator makes pictures that are rewarded; for SamplerCustomAdvanced.",
            search_aliases=["one step", "noise tilt", "RandomNoise", "SD-Turbo", "initial noise"],
            inputs=[
                NETWORK.Input(
                    "network", tooltip="A network that tilts noise: its samples were collected with the target noise."
                ),
                io.Conditioning.Input(
                    "conditioning", tooltip="What the pictures should show; the guider's own conditioning."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The seed of the noise before it is tilted.",
                ),
                noise_steps_input("steps"),
                strength_input(TILTS),
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, network: LoadedNetwork, conditioning: list, seed: int, steps: int, strength: float
    ) -> io.NodeOutput:
        network.require("noise", "Apply Guidance Network")
        return io.NodeOutput(GuidedNoise(network, conditioning, seed, steps, strength))


@prepares_inputs
class NetworkKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceKSamplerNetwork",
            display_name="KSampler (Guidance Network)",
            category=CATEGORY,
            description="A KSampler whose pictures follow what a guidance network learned: on the way for multi-step models, in the noise for "
            "one-step generators.",
            search_aliases=["guidance network sampler", "one step sampler", "SD-Turbo", "aligned sampling"],
            inputs=[
                io.Model.Input("model", tooltip="The model, of the family that the network was trained for."),
                NETWORK.Input("network", tooltip="The guidance network."),
                *sampler_inputs(),
                strength_input(),
                *interval_inputs("guidance of a multi-step model", "0.7 to 1"),
                noise_steps_input(advanced=True),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        network: LoadedNetwork,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        strength: float,
        start_percent: float,
        end_percent: float,
        noise_steps: int,
    ) -> io.NodeOutput:
        plain = Sampling(model, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        sampling = followed(plain, network, strength, start_percent, end_percent, noise_steps)
        samples = sampling(latent_image, [seed], sampling.progress(1)(0))
        return io.NodeOutput(sampled(latent_image, list(range(len(samples_of(latent_image)))), samples))


NODES = [LoadNetwork, SaveNetwork, ApplyNetwork, Noise, NetworkKSampler]
