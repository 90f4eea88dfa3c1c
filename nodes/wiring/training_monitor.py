"""Runs a training in the graph: progress, previews, interrupts."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean

import comfy.model_management
import comfy.utils
import torch
from comfy.model_management import InterruptProcessingException as Interrupt
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...guidance.rewards import RewardError
from ...guidance.training.loop import Progress
from ...guidance.training.report import Fitting
from .autograd import as_nodes_run
from .loaded import manage_network
from .patch_network import followed
from .reporting import NodeStep, Reporter
from .sample_maker import GuidanceData, SampleMaker, picture
from .scoring import decode, weighted_parts

log = logging.getLogger(__name__)
PREVIEWED = 4
"""Samples in a preview."""


@dataclass(frozen=True, kw_only=True)
class TrainingStep(NodeStep):
    effective: float
    """The share of the samples that count."""


@dataclass(frozen=True)
class Preview:
    picture: Image.Image
    """Of all, side by side."""
    rewards: list[float]


@dataclass
class TrainingMonitor:
    """Runs a training, tells the page how it goes, and ends it early where it is interrupted."""

    fitting: Fitting
    report: Reporter
    preview: Callable[[Fitting], Preview] | None
    preview_every: int

    def run(self) -> None:
        training, steps = self.fitting.training, self.fitting.training.task.plan.steps
        losses: list[float] = []
        bar = comfy.utils.ProgressBar(steps)
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            for progress in training:
                # This takes the interrupt back, so that what comes after this node runs.
                comfy.model_management.throw_exception_if_processing_interrupted()
                losses.append(progress.loss)
                preview = self.look(progress.step)
                told = self.tell(progress, fmean(losses), preview)
                if told:
                    losses.clear()
                if told or preview:
                    bar.update_absolute(progress.step, steps, preview and ("JPEG", preview.picture, None))
        except Interrupt:
            with suppress(Interrupt):  # who is impatient gets what was the best at the last look
                training.pause()
            if not training.curve:
                raise

    def look(self, step: int) -> Preview | None:
        """At samples that the best network so far guides, where it is time for it."""
        return (
            self.preview(self.fitting)
            if self.preview and self.fitting.training.curve and step % self.preview_every == 0
            else None
        )

    def tell(self, progress: Progress, loss: float, preview: Preview | None) -> bool:
        """Whether it was told: of a long training not every step is."""
        steps, effective = self.fitting.training.task.plan.steps, self.fitting.health.effective
        check = {} if progress.check is None else {"loss/held-out": [progress.check]}
        rewards = {} if preview is None else {"reward": preview.rewards}
        if not self.report(
            TrainingStep(
                step=progress.step, steps=steps, series={"loss": [loss]} | check | rewards, effective=effective
            )
        ):
            return False
        best = self.fitting.best()
        held_out = (
            "" if best is None else f" · held-out {self.fitting.training.curve[-1][1]:.4f}, at best {best[1]:.4f}"
        )
        text = f"step {progress.step}/{steps} · loss {loss:.4f}{held_out} · {effective:.0%} of samples count"
        PromptServer.instance.send_progress_text(text, self.report.node)
        return True


def first_pictures(data: GuidanceData) -> Callable[[Fitting], Preview]:
    """The first samples of a collection, as the best network so far would guide them."""
    maker, description = data.ask("A preview"), data.collection.description
    prompts, seeds = zip(
        *[(description.prompt_of(number), description.seed_of(number)) for number in range(PREVIEWED)], strict=True
    )

    def draw(fitting: Fitting) -> Preview:
        network = manage_network(fitting.network(), fitting.card())
        with as_nodes_run():
            latents = maker.sample(prompts, seeds, lambda *_: None, lambda sampling: followed(sampling, network))
            clips = decode(maker.vae, latents)
            scores = torch.stack(
                [score_or_nan(maker, clip, maker.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]
            )
        return Preview(
            picture(torch.cat(list(clips[:, 0]), 1)), description.combined(scores, fitting.reward_weights).tolist()
        )

    return draw


def score_or_nan(maker: SampleMaker, clip: Tensor, prompt: str) -> Tensor:
    """Raw scores (R,); not numbers where a reward refuses what a network has made so far, which is no reason to lose the training."""
    try:
        return maker.judge(clip, prompt)
    except RewardError as error:
        log.warning("%s The preview has no reward.", error)
        return torch.full((len(weighted_parts(maker.reward.reward)),), math.nan)
