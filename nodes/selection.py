"""Nodes that choose among samples by their rewards."""

from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..guidance.errors import GuidanceError
from ..guidance.particles import at_least, best
from ..guidance.rewards import require_prompt
from .wiring.decoders import check_belongs
from .wiring.inputs import HIDDEN, REWARD, held_out_input, sampler_inputs
from .wiring.latents import SEEDS, fitted, joined, rows, sampled
from .wiring.loaded import LoadedReward
from .wiring.metadata import downstream_inputs, note
from .wiring.node import prepares_inputs
from .wiring.prompts import plain
from .wiring.reporting import Reporter
from .wiring.sampling import Sampling, seeds_from
from .wiring.scoring import decode, frames_of, log, remarks, score
from .wiring.search import Candidate, Search, SearchStep, search_report, search_step

CATEGORY = "reward guidance/selection"
UNKNOWN_SEED = -1
PICTURES = 0
"""Output of Select Best."""


@prepares_inputs
class SelectBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceSelectBest",
            display_name="Select Best",
            category=CATEGORY,
            description="Keeps the best of a batch, best first: pictures, latents, scores, indices and seeds together.",
            search_aliases=["top k", "best of n", "rank images", "filter by score", "sort by score"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The candidates as pictures: a batch, or a list of pictures of one size.",
                ),
                io.Latent.Input(
                    "latents", optional=True, tooltip="The candidates as latents, in the order of the pictures."
                ),
                REWARD.Input(
                    "reward",
                    optional=True,
                    tooltip="What to choose by. It scores the pictures, or the latents through the vae.",
                ),
                io.Float.Input(
                    "scores",
                    optional=True,
                    force_input=True,
                    tooltip="In place of a reward: a number for each candidate, higher is better, such as Score Images gives.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes latents to score where no pictures are connected."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt of the pictures, for rewards that compare with one.",
                ),
                io.Combo.Input(
                    "choose",
                    options=["best", "above threshold"],
                    optional=True,
                    tooltip="best: the highest scores, as many as keep says. above threshold: all whose score is at least the threshold.",
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="best: how many candidates to keep, 1 to 8. Of fewer, all are kept.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=-1e6,
                    max=1e6,
                    step=0.05,
                    optional=True,
                    tooltip="above threshold: the lowest score to keep, in units of the reward's typical spread (0 to 2), or of the scores given.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The chosen pictures, best first; of videos their frames, one video after the other.",
                ),
                io.Latent.Output(display_name="latents", tooltip="Their latents."),
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="Standardized rewards, or the scores given."
                ),
                io.Int.Output(
                    display_name="indices", is_output_list=True, tooltip="Where they were in the batch, from 0."
                ),
                io.Int.Output(
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="The seed of each, if the latents come from KSampler (Best of N); else -1.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        prompt: list[str],
        choose: list[str],
        keep: list[int],
        threshold: list[float],
        images: list[Tensor] | None = None,
        latents: list[dict] | None = None,
        reward: list[LoadedReward] | None = None,
        scores: list[float] | None = None,
        vae: list[Any] | None = None,
    ) -> io.NodeOutput:
        latent = joined(latents) if latents else None
        batches = images
        if batches is None and latent is not None and vae is not None:
            require_its_vae(vae[0], latent["samples"])
            batches = [decode(vae[0], latent["samples"])]
        clips = None if batches is None else torch.cat(of_one_size(batches))
        values = scored(batches, reward, prompt) if scores is None else as_numbers(scores)
        counts = {"scores": values, "pictures": clips, "latents": None if latent is None else latent["samples"]}
        videos = latent is not None and latent["samples"].ndim == 5
        require_one_each({name: len(each) for name, each in counts.items() if each is not None}, videos)
        chosen = best(values, keep[0]) if choose[0] == "best" else at_least(values, threshold[0])
        kept = None if latent is None else rows(latent, chosen)
        seeds = (kept or {}).get(SEEDS, [UNKNOWN_SEED] * len(chosen))
        by = {"reward": reward[0].reward.name, "prompt": prompt} if reward and scores is None else {}
        note(
            cls.hidden,
            {**by, "standardized" if by else "scores": values[chosen].tolist(), "indices": chosen, "seeds": seeds},
        )
        return io.NodeOutput(
            nothing_for("images") if clips is None else frames_of(clips[chosen]),
            nothing_for("latents") if kept is None else kept,
            values[chosen].tolist(),
            chosen,
            seeds,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return downstream_inputs(cls.hidden, (PICTURES,))


def as_numbers(scores: list) -> Tensor:
    """Scores (N,) that came from anywhere."""
    try:
        return torch.tensor(scores, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GuidanceError(
            f"Select Best got scores that are not numbers: {shorten(str(scores), 100, placeholder=' ...')}."
        ) from error


def scored(batches: list[Tensor] | None, reward: list[LoadedReward] | None, prompts: list[str]) -> Tensor:
    """Standardized rewards of every picture or video; of a list of prompts, each serves one entry of the list of them."""
    if batches is None:
        raise GuidanceError("Select Best has nothing to score: connect images, or latents and their vae, or scores.")
    if reward is None:
        raise GuidanceError("Select Best has nothing to choose by: connect a reward or scores.")
    for remark in dict.fromkeys(remark for prompt in prompts for remark in remarks(prompt, reward[0])):
        log.info(remark)
    paired = [(clips, prompts[min(i, len(prompts) - 1)]) for i, clips in enumerate(batches)]
    return torch.cat([score(clips, reward[0], prompt) for clips, prompt in paired])


def of_one_size(batches: list[Tensor]) -> list[Tensor]:
    if not batches:
        raise GuidanceError("There is nothing to choose from: the list of pictures is empty.")
    sizes = {tuple(clips.shape[-3:]) for clips in batches}
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height} with {channels} channels" for height, width, channels in sorted(sizes))
        raise GuidanceError(
            f"Pictures of different sizes or channels cannot be chosen among: {found}. Make them alike first."
        )
    return batches


def require_its_vae(vae, latents: Tensor) -> None:
    if vae.latent_channels != latents.shape[1]:
        raise GuidanceError(
            f"The connected VAE decodes {vae.latent_channels} latent channels, but the latents have {latents.shape[1]}. "
            "Connect the VAE of the model that made them."
        )


def require_one_each(counts: dict[str, int], videos: bool) -> None:
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        advice = " Of videos, connect the vae in place of the images." if videos and "pictures" in counts else ""
        raise GuidanceError(f"Select Best got {found}; it needs one of each for every candidate.{advice}")


def nothing_for(output: str) -> ExecutionBlocker:
    return ExecutionBlocker(f"Select Best has no {output} to give: none are connected to its input.")


@prepares_inputs
class BestOfN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rare = dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceKSamplerBestOfN",
            display_name="KSampler (Best of N)",
            category=CATEGORY,
            description="Samples every latent n times, from the seeds seed, seed + 1, ..., and keeps the candidates that a reward likes best.",
            search_aliases=["best of n", "rejection sampling", "seed search", "top k", "reward search"],
            inputs=[
                io.Model.Input("model", tooltip="The model, which may itself be guided by a reward."),
                *sampler_inputs(),
                io.Vae.Input("vae", tooltip="Decodes the candidates, to be scored and shown."),
                REWARD.Input("reward", tooltip="What to choose by. It needs no gradient."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt, for rewards that compare the picture with it. Write the same text as in the positive prompt.",
                ),
                io.Int.Input(
                    "n",
                    default=4,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Candidates for each latent of the batch: the best of more is better, and sampling takes n times as long. 2 to 16.",
                ),
                io.Int.Input(
                    "keep", default=1, min=1, max=4096, tooltip="How many of them to keep, best first. 1 to 4.", **rare
                ),
                io.Float.Input(
                    "stop_above",
                    default=100.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Stop early once enough candidates are this good, in units of the reward's typical spread. 1 to 3; 100 never stops.",
                    **rare,
                ),
                io.Int.Input(
                    "chunk",
                    default=1,
                    min=0,
                    max=4096,
                    tooltip="How many candidates to sample at once, 1 to 16; 0 takes as many as memory holds. With 1 a stock KSampler makes each "
                    "again from its seed, bit for bit; with more, to rounding, and guided ones only roughly.",
                    **rare,
                ),
                held_out_input(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents", tooltip="The best latents, best first, latent by latent of the batch."
                ),
                io.Image.Output(display_name="images", tooltip="The same as pictures."),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Their rewards, in units of the reward's typical spread.",
                ),
                io.Int.Output(
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="The seed of each, for a stock KSampler with batch size 1.",
                ),
                io.String.Output(display_name="report", tooltip="Every candidate's seed and reward as readable lines."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        vae,
        reward: LoadedReward,
        prompt: str,
        n: int,
        keep: int,
        stop_above: float,
        chunk: int,
        held_out: LoadedReward | None = None,
    ) -> io.NodeOutput:
        for judge in filter(None, (reward, held_out)):
            require_prompt(judge.reward, [plain(prompt)])
        check_belongs(vae, model.get_model_object("latent_format"))
        begun = fitted(model, latent_image)
        sampling = Sampling(model, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        originals = sampling.each(begun)
        seeds = seeds_from(seed, n * len(originals))
        reporter, all_steps = Reporter(cls.hidden, decoder="vae"), list[SearchStep]()

        def report(fresh: list[Candidate], highest: float) -> None:
            all_steps.append(search_step(fresh, highest, seeds))
            reporter(all_steps[-1])

        search = Search(sampling, vae, reward, held_out, prompt, min(keep, n), stop_above, report)
        at_once = sampling.at_once(chunk, begun, n)
        runs = -(-n // at_once)
        callbacks = sampling.progress(runs * len(originals))
        found: list[list[Candidate]] = []
        for i, (alone, latent) in enumerate(originals):
            own = seeds[i * n : (i + 1) * n]
            chunks = [own[start : start + at_once] for start in range(0, n, at_once)]
            turns = map(callbacks, range(i * runs, (i + 1) * runs))
            found.append(replace(search, sampling=alone)(latent, chunks, turns))
        kept = [(i, candidate) for i, candidates in enumerate(found) for candidate in candidates]
        return io.NodeOutput(
            sampled(begun, [i for i, _ in kept], torch.cat([c.latent for _, c in kept]), [c.seed for _, c in kept]),
            torch.cat([candidate.pictures for _, candidate in kept]),
            [candidate.score for _, candidate in kept],
            [candidate.seed for _, candidate in kept],
            "\n".join(
                [
                    search_report(all_steps, [candidate.seed for _, candidate in kept]),
                    *remarks(prompt, reward, held_out),
                ]
            ),
            ui={"reward_guidance": reporter.history},
        )


NODES = [SelectBest, BestOfN]
