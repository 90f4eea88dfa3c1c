"""Best of n: samples candidates from successive seeds and keeps those with the highest scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...guidance.rewards import require_prompt
from .latents import fit_latent, sampled_latent
from .loaded import LoadedReward
from .prompts import plain
from .reporting import NodeStep
from .sampling import Callback, Sampling, seeds_from
from .scoring import decode, standardized_scores


@dataclass(frozen=True)
class Candidate:
    seed: int
    score: float
    held_out: float | None
    latent: Tensor
    """(1,...)"""
    clip: Tensor
    """(T,H,W,C), T = 1 for an image."""


@dataclass(frozen=True, kw_only=True)
class SearchStep(NodeStep):
    """A chunk of candidates was sampled and scored."""

    seeds: tuple[int, ...]
    scattered: tuple[str, ...] = ("reward", "reward/held-out")


@dataclass(frozen=True)
class BestOfN:
    """The result of a search."""

    latent: dict
    """The LATENT of the kept candidates."""
    kept: list[Candidate]
    """Best first, one latent of the batch after the other."""
    steps: list[SearchStep]

    def report(self) -> str:
        """One line a candidate: its seed, its reward, and whether it was kept."""
        kept = [candidate.seed for candidate in self.kept]
        lines = [
            f"seed {seed}: {reward:+.3f}{' kept' if seed in kept else ''}"
            for step in self.steps
            for seed, reward in zip(step.seeds, step.series["reward"], strict=True)
        ]
        return f"{len(kept)} of {len(lines)} candidates kept\n" + "\n".join(lines)


@dataclass(frozen=True)
class Search:
    """Best of n for every latent of a batch."""

    sampling: Sampling
    vae: Any
    reward: LoadedReward
    held_out: LoadedReward | None
    prompt: str
    keep: int
    """Candidates to keep for each latent."""
    stop_above: float
    chunk: int
    """Candidates to sample at once; 0: as many as fit in memory."""

    def __post_init__(self):
        for loaded in filter(None, (self.reward, self.held_out)):
            require_prompt(loaded.reward, [plain(self.prompt)])

    def run(self, latent_image: dict, seed: int, n: int, on_step: Callable[[SearchStep], object]) -> BestOfN:
        """Sample n candidates for each latent from the seeds seed, seed + 1, ... and keep the best."""
        start = fit_latent(self.sampling.model, latent_image)
        originals = self.sampling.each(start)
        seeds = seeds_from(seed, n * len(originals))
        chunk = self.sampling.at_once(self.chunk, start, n)
        runs = -(-n // chunk)
        callbacks = self.sampling.progress(runs * len(originals))
        kept: list[tuple[int, Candidate]] = []
        progress = SearchProgress(seeds, on_step)
        for i, (sampling, latent) in enumerate(originals):
            own = seeds[i * n : (i + 1) * n]
            chunks = [own[first : first + chunk] for first in range(0, n, chunk)]
            callbacks_of_chunks = map(callbacks, range(i * runs, (i + 1) * runs))
            found = replace(self, sampling=sampling).best(latent, chunks, callbacks_of_chunks, progress)
            kept += [(i, candidate) for candidate in found]
        best = [candidate for _, candidate in kept]
        samples = torch.cat([candidate.latent for candidate in best])
        out = sampled_latent(start, [i for i, _ in kept], samples, [candidate.seed for candidate in best])
        return BestOfN(out, best, progress.steps)

    def best(
        self,
        latent: dict,
        chunks: list[list[int]],
        callbacks: Iterable[Callback],
        progress: "SearchProgress",
    ) -> list[Candidate]:
        """The best `keep` candidates of one latent, best first. Stops once all of them reach `stop_above`.

        Candidates that are not kept are deleted after each chunk.
        """
        found: list[Candidate] = []
        for seeds, callback in zip(chunks, callbacks, strict=True):
            new = self.candidates(latent, seeds, callback)
            found = sorted([*found, *new], key=lambda candidate: -candidate.score)[: self.keep]
            progress(new, found[0].score)
            if len(found) == self.keep and found[-1].score >= self.stop_above:
                break
        return found

    def candidates(self, latent: dict, seeds: list[int], callback: Callback) -> list[Candidate]:
        latents = self.sampling(latent, seeds, callback)
        clips = decode(self.vae, latents)
        scores = standardized_scores(clips, self.reward, self.prompt).tolist()
        held_out = [None] * len(scores)
        if self.held_out:
            held_out = standardized_scores(clips, self.held_out, self.prompt).tolist()
        return [Candidate(*each) for each in zip(seeds, scores, held_out, latents.split(1), clips, strict=True)]


@dataclass
class SearchProgress:
    """Turns chunks of candidates into steps, and passes each step on."""

    seeds: list[int]
    on_step: Callable[[SearchStep], object]
    steps: list[SearchStep] = field(default_factory=list)

    def __call__(self, new: list[Candidate], highest: float) -> None:
        """highest: the best score of the present latent so far."""
        own = tuple(candidate.seed for candidate in new)
        series = {"reward": [candidate.score for candidate in new], "reward/best": [highest]}
        if held_out := [candidate.held_out for candidate in new if candidate.held_out is not None]:
            series["reward/held-out"] = held_out
        step = self.seeds.index(own[-1]) + 1
        self.steps.append(SearchStep(step=step, steps=len(self.seeds), series=series, seeds=own))
        self.on_step(self.steps[-1])
