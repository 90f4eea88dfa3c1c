"""Nodes that select samples by their rewards."""

from typing import Any

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..guidance.particles import at_least, best
from .wiring.candidates import (
    missing_output,
    require_one_size,
    require_same_counts,
    require_vae_channels,
    score_batches,
    scores_tensor,
)
from .wiring.inputs import HIDDEN, REWARD, held_out_input, sampler_inputs
from .wiring.latents import SEEDS, join_latents, select_samples
from .wiring.loaded import LoadedReward
from .wiring.metadata import add_entry, downstream_inputs
from .wiring.node import prepares_inputs
from .wiring.reporting import Reporter
from .wiring.sampling import Sampling
from .wiring.scoring import decode, frames_of, prompt_remarks
from .wiring.search import Search
from .wiring.vae_decoder import require_matching_vae

CATEGORY = "reward guidance/selection"
UNKNOWN_SEED = -1
IMAGES_OUTPUT = 0


@prepares_inputs
class SelectBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceSelectBest",
            display_name="Select Best",
            category=CATEGORY,
            description="Keeps the best candidates of a batch, best first: pictures, latents, scores, indices and "
            "seeds.",
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
                    tooltip="The reward to select by. It scores the pictures, or the latents decoded by the vae.",
                ),
                io.Float.Input(
                    "scores",
                    optional=True,
                    force_input=True,
                    tooltip="In place of a reward: a number for each candidate, higher is better. Score Images gives "
                    "such numbers.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Decodes the latents to score them, if no pictures are connected."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt of the pictures, for rewards that compare the picture with it.",
                ),
                io.Combo.Input(
                    "choose",
                    options=["best", "above threshold"],
                    optional=True,
                    tooltip="best: the keep candidates with the highest scores. above threshold: all candidates whose "
                    "score is at least the threshold.",
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="best: number of candidates to keep. 1 to 8. If there are fewer, all are kept.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=-1e6,
                    max=1e6,
                    step=0.05,
                    optional=True,
                    tooltip="above threshold: the lowest score to keep, in units of the reward's typical spread (0 to "
                    "2), or in units of the connected scores.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The kept pictures, best first. For videos: their frames, one video after the other.",
                ),
                io.Latent.Output(display_name="latents", tooltip="Their latents."),
                io.Float.Output(
                    display_name="scores", is_output_list=True, tooltip="Standardized rewards, or the connected scores."
                ),
                io.Int.Output(
                    display_name="indices", is_output_list=True, tooltip="Their positions in the batch, from 0."
                ),
                io.Int.Output(
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="Their seeds, if the latents come from KSampler (Best of N); else -1.",
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
        latent = join_latents(latents) if latents else None
        batches = images
        if batches is None and latent is not None and vae is not None:
            require_vae_channels(vae[0], latent["samples"])
            batches = [decode(vae[0], latent["samples"])]
        if batches is not None:
            require_one_size(batches)
        clips = None if batches is None else torch.cat(batches)
        values = score_batches(batches, reward, prompt) if scores is None else scores_tensor(scores)
        counts = {"scores": values, "pictures": clips, "latents": None if latent is None else latent["samples"]}
        videos = latent is not None and latent["samples"].ndim == 5
        require_same_counts({name: len(each) for name, each in counts.items() if each is not None}, videos)
        chosen = best(values, keep[0]) if choose[0] == "best" else at_least(values, threshold[0])
        kept = None if latent is None else select_samples(latent, chosen)
        seeds = (kept or {}).get(SEEDS, [UNKNOWN_SEED] * len(chosen))
        by = {"reward": reward[0].reward.name, "prompt": prompt} if reward and scores is None else {}
        kind = "standardized" if by else "scores"
        add_entry(cls.hidden, {**by, kind: values[chosen].tolist(), "indices": chosen, "seeds": seeds})
        return io.NodeOutput(
            missing_output("images") if clips is None else frames_of(clips[chosen]),
            missing_output("latents") if kept is None else kept,
            values[chosen].tolist(),
            chosen,
            seeds,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return downstream_inputs(cls.hidden, (IMAGES_OUTPUT,))


@prepares_inputs
class BestOfN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rare = dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceKSamplerBestOfN",
            display_name="KSampler (Best of N)",
            category=CATEGORY,
            description="Samples every latent n times with the seeds seed, seed + 1, ..., and keeps the candidates "
            "with the highest rewards.",
            search_aliases=["best of n", "rejection sampling", "seed search", "top k", "reward search"],
            inputs=[
                io.Model.Input("model", tooltip="The model. It may also be guided by a reward."),
                *sampler_inputs(),
                io.Vae.Input("vae", tooltip="Decodes the candidates for the reward and for the output."),
                REWARD.Input("reward", tooltip="The reward to select by. It needs no gradient."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt, for rewards that compare the picture with it. "
                    "Write the same text as in the positive prompt.",
                ),
                io.Int.Input(
                    "n",
                    default=4,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Number of candidates for each latent of the batch. More candidates give a better best "
                    "one; sampling takes n times as long. 2 to 16.",
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Number of candidates to keep, best first. 1 to 4.",
                    **rare,
                ),
                io.Float.Input(
                    "stop_above",
                    default=100.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Stop early when keep candidates have at least this score, in units of the reward's "
                    "typical spread. 1 to 3; 100 never stops.",
                    **rare,
                ),
                io.Int.Input(
                    "chunk",
                    default=1,
                    min=0,
                    max=4096,
                    tooltip="Number of candidates to sample at once, 1 to 16; 0 for as many as fit in memory. With 1, "
                    "a stock KSampler with the seed makes the same picture, bit for bit; with more, up to rounding, "
                    "and guided pictures only roughly.",
                    **rare,
                ),
                held_out_input(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    tooltip="The kept latents, best first, for one latent of the batch after the other.",
                ),
                io.Image.Output(display_name="images", tooltip="The kept latents, decoded."),
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
                io.String.Output(display_name="report", tooltip="One line for every candidate: its seed and reward."),
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
        require_matching_vae(vae, model.get_model_object("latent_format"))
        sampling = Sampling(model, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        reporter = Reporter(cls.hidden, decoder="vae")
        search = Search(sampling, vae, reward, held_out, prompt, min(keep, n), stop_above, chunk)
        best_of_n = search.run(latent_image, seed, n, reporter)
        kept = best_of_n.kept
        report = [best_of_n.report(), *prompt_remarks(prompt, reward, held_out)]
        return io.NodeOutput(
            best_of_n.latent,
            torch.cat([candidate.clip for candidate in kept]),
            [candidate.score for candidate in kept],
            [candidate.seed for candidate in kept],
            "\n".join(report),
            ui={"reward_guidance": reporter.history},
        )


NODES = [SelectBest, BestOfN]
