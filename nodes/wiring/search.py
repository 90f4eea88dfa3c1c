"""Best of n."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .loaded import LoadedReward
from .reporting import NodeStep
from .sampling import Callback, Sampling
from .scoring import decode, score


@dataclass(frozen=True)
class Candidate:
    seed: int
    score: float
    held_out: float | None
    latent: Tensor
    """(1,...)"""
    pictures: Tensor
    """(T,H,W,C)"""


@dataclass(frozen=True, kw_only=True)
class SearchStep(NodeStep):
    """A step of a search: some candidates are sampled and scored."""

    seeds: tuple[int, ...]
    scattered: tuple[str, ...] = ("reward", "reward/held-out")


@dataclass(frozen=True)
class Search:
    """Best of n of one latent at a time."""

    sampling: Sampling
    vae: Any
    reward: LoadedReward
    held_out: LoadedReward | None
    prompt: str
    keep: int
    stop_above: float
    report: Callable[[list[Candidate], float], None]
    """Hears of fresh candidates, and of the best score so far."""

    def __call__(self, latent: dict, chunks: list[list[int]], callbacks: Iterable[Callback]) -> list[Candidate]:
        """The best `keep` of chunks of seeds, best first; losers are forgotten on the way. Ends once that many reach `stop_above`."""
        found: list[Candidate] = []
        for seeds, callback in zip(chunks, callbacks, strict=True):
            fresh = self.candidates(latent, seeds, callback)
            found = sorted([*found, *fresh], key=lambda candidate: -candidate.score)[: self.keep]
            self.report(fresh, found[0].score)
            if len(found) == self.keep and found[-1].score >= self.stop_above:
                break
        return found

    def candidates(self, latent: dict, seeds: list[int], callback: Callback) -> list[Candidate]:
        latents = self.sampling(latent, seeds, callback)
        clips = decode(self.vae, latents)
        scores = score(clips, self.reward, self.prompt).tolist()
        others = score(clips, self.held_out, self.prompt).tolist() if self.held_out else [None] * len(scores)
        return [Candidate(*each) for each in zip(seeds, scores, others, latents.split(1), clips, strict=True)]


def search_step(fresh: list[Candidate], highest: float, seeds: list[int]) -> SearchStep:
    own = tuple(candidate.seed for candidate in fresh)
    series = {"reward": [candidate.score for candidate in fresh], "reward/best": [highest]}
    if others := [candidate.held_out for candidate in fresh if candidate.held_out is not None]:
        series["reward/held-out"] = others
    return SearchStep(step=seeds.index(own[-1]) + 1, steps=len(seeds), series=series, seeds=own)


def search_report(all_steps: list[SearchStep], kept: list[int]) -> str:
    lines = [
        f"seed {seed}: {reward:+.3f}{' kept' if seed in kept else ''}"
        for step in all_steps
        for seed, reward in zip(step.seeds, step.series["reward"], strict=True)
    ]
    return f"{len(kept)} of {len(lines)} candidates kept\n" + "\n".join(lines)
