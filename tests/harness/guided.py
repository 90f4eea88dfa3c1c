"""Prompts with the pack's nodes, and the exact latents that they make."""

import itertools
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .client import Client, Prompt, Result
from .graphs import Family, Graph, Link, probed, text_to_image

BLUE = int("3366cc", 16)


class Bench:
    """A client that fills in the defaults of every widget left out, and reads latents."""

    def __init__(self, client: Client):
        self.client = client

    @cached_property
    def object_info(self) -> dict[str, dict]:
        return self.client.object_info()

    def queue(self, prompt: Prompt, **options) -> Result:
        """The run, good or bad."""
        return self.client.run(complete(prompt, self.object_info), **options)

    def run(self, prompt: Prompt, **options) -> Result:
        return self.queue(prompt, **options).check()

    def latent(self, result: Result, node: str = "save") -> Tensor:
        return self.latents(result, node)[0]

    def latents(self, result: Result, node: str = "save") -> list[Tensor]:
        return [self.read(file) for file in result.outputs[node]["latents"]]

    def read(self, file: dict) -> Tensor:
        path = f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}"
        return safetensors.torch.load(self.client.fetch(path))["latent_tensor"]

    def sample(
        self, family: Family | str, guide: "Guide" = lambda graph, inputs: stock(graph, inputs), **options
    ) -> Tensor:
        """The latent that one way of sampling makes."""
        return self.latent(self.run(latents(family, guide, **options)))


Guide = Callable[[Graph, dict], Link]
"""(graph, KSampler's inputs) -> the sampled latent."""


def complete(prompt: Prompt, object_info: dict[str, dict]) -> Prompt:
    """The prompt with the default of every required widget that it leaves out, as the page would send it."""
    return {
        node: {**content, "inputs": defaults(object_info[content["class_type"]]) | content["inputs"]}
        for node, content in prompt.items()
    }


def defaults(info: dict) -> dict[str, Any]:
    found = {}
    for name, spec in info["input"].get("required", {}).items():
        options = spec[1] if len(spec) > 1 else {}
        choices = spec[0] if isinstance(spec[0], list) else options.get("options")
        if "default" in options:
            found[name] = options["default"]
        elif choices:
            found[name] = choices[0]
    return found


def latents(family: Family | str, guide: Guide, count_calls: bool = False, **options) -> Prompt:
    """Loaders to SaveLatent, which is the node `save`. options: of text_to_image."""
    if count_calls:
        options["before_sampler"] = probed
    prompt = text_to_image(family, sampler=guide, **options)
    samples = prompt.pop("decode")["inputs"]["samples"]
    prompt.pop("other_vae", None)
    prompt["save"] = {"class_type": "SaveLatent", "inputs": {"samples": samples, "filename_prefix": "latents/test"}}
    return prompt


def stock(graph: Graph, inputs: dict) -> Link:
    return graph.add("sampler", "KSampler", **inputs)


def one_box(**options: Any) -> Guide:
    """KSampler (Reward Guided). options: of the node; `reward` is brightness if left out."""
    return lambda graph, inputs: graph.add("sampler", "RewardGuidanceKSampler", **inputs, **with_reward(graph, options))


def two_nodes(**options: Any) -> Guide:
    """Reward Guidance and the stock KSampler."""

    def build(graph: Graph, inputs: dict) -> Link:
        return stock(graph, inputs | {"model": guided_model(graph, inputs["model"], **options)})

    return build


def guided_model(graph: Graph, model: Link, node: str = "guidance", **options: Any) -> Link:
    return graph.add(node, "RewardGuidance", model=model, **with_reward(graph, options))


def under_control(guide: Guide) -> Guide:
    """The same with a ControlNet, of SD1.5."""

    def build(graph: Graph, inputs: dict) -> Link:
        hint = graph.add("hint", "EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
        control = graph.add("control", "ControlNetLoader", control_net_name="control_v11p_sd15_canny.pth")
        conditions = {name: inputs[name] for name in ("positive", "negative")}
        graph.add("controlled", "ControlNetApplyAdvanced", control_net=control, image=hint, strength=1.0, **conditions)
        return guide(graph, inputs | {"positive": ["controlled", 0], "negative": ["controlled", 1]})

    return build


def with_reward(graph: Graph, options: dict) -> dict:
    """Options in which a reward, or a function that makes one, becomes a link; None leaves the reward unconnected."""
    made = {
        name: value(graph) if callable(value) else value for name, value in ({"reward": statistic()} | options).items()
    }
    return {name: value for name, value in made.items() if value is not None}


def reward_file(name: str, **options: Any) -> Callable[[Graph], Link]:
    """Load Reward Model with this file."""
    return lambda graph: graph.add("loaded", "RewardGuidanceLoadReward", reward_name=name, **options)


def broken(breakage: str) -> Callable[[Graph], Link]:
    """A reward that goes wrong in this way, one of ProbeBrokenReward's."""
    return lambda graph: graph.add("broken", "ProbeBrokenReward", reward=statistic()(graph), breakage=breakage)


def wired(value: int | float) -> Callable[[Graph], Link]:
    """A number from another node, where ComfyUI does not check the limits of the widget."""
    kind = "PrimitiveInt" if isinstance(value, int) else "PrimitiveFloat"
    return lambda graph: graph.add(f"number_{value}", kind, value=value)


def seeds_of(file: str) -> Iterator[int]:
    """Seeds a hundred apart that no other test file uses, so that ComfyUI runs every prompt and takes none from its cache."""
    return itertools.count(1000 * zlib.crc32(Path(file).stem.encode()), 100)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two elements."""
    return float((one - other).abs().max())


def mean_reward(step: dict) -> float:
    """Of one step that a node reported."""
    rewards = step["series"]["reward"]
    return sum(rewards) / len(rewards)


def statistic(name: str = "brightness", node: str = "reward", **options: Any) -> Callable[[Graph], Link]:
    return lambda graph: graph.add(node, "RewardGuidanceImageStatistic", statistic=name, **options)
