"""Runs a training inside a node: reports progress, shows previews, and handles interrupts."""

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
from .patch_network import guided_sampling
from .reporting import NodeStep, Reporter
from .sample_maker import GuidanceData, SampleMaker, to_image
from .scoring import decode, weighted_parts

log = logging.getLogger(__name__)
PREVIEWED = 4
"""Samples in a preview."""


@dataclass(frozen=True, kw_only=True)
class TrainingStep(NodeStep):
    effective: float
    """Effective share of the samples, 0 to 1."""


@dataclass(frozen=True)
class Preview:
    image: Image.Image
    """All samples side by side."""
    rewards: list[float]


@dataclass
class TrainingMonitor:
    """Runs a training and reports its progress. An interrupt ends it early with the best network so far."""

    fitting: Fitting
    reporter: Reporter
    preview: Callable[[Fitting], Preview] | None
    preview_every: int
    """Steps between two previews."""

    def run(self) -> None:
        """Train to the end or to an interrupt. Raises the interrupt again if there was no held-out evaluation yet."""
        training, steps = self.fitting.training, self.fitting.training.task.plan.steps
        losses: list[float] = []
        bar = comfy.utils.ProgressBar(steps)
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            for progress in training:
                # The check also clears the interrupt, so that the nodes after this one run.
                comfy.model_management.throw_exception_if_processing_interrupted()
                losses.append(progress.loss)
                preview = self.preview_at(progress.step)
                reported = self.report(progress, fmean(losses), preview)
                if reported:
                    losses.clear()
                if reported or preview:
                    bar.update_absolute(progress.step, steps, preview and ("JPEG", preview.image, None))
        except Interrupt:
            with suppress(Interrupt):  # a second interrupt skips the last held-out evaluation
                training.pause()
            if not training.curve:
                raise

    def preview_at(self, step: int) -> Preview | None:
        """A preview by the best network so far, every `preview_every` steps; else None."""
        if self.preview is None or not self.fitting.training.curve or step % self.preview_every:
            return None
        return self.preview(self.fitting)

    def report(self, progress: Progress, loss: float, preview: Preview | None) -> bool:
        """Report a step, or skip it in a long training.

        Returns whether it was reported. loss: the mean since the last report.
        """
        steps, effective = self.fitting.training.task.plan.steps, self.fitting.health.effective
        check = {} if progress.check is None else {"loss/held-out": [progress.check]}
        rewards = {} if preview is None else {"reward": preview.rewards}
        series = {"loss": [loss]} | check | rewards
        if not self.reporter(TrainingStep(step=progress.step, steps=steps, series=series, effective=effective)):
            return False
        best, curve = self.fitting.best(), self.fitting.training.curve
        held_out = "" if best is None else f" · held-out {curve[-1][1]:.4f}, at best {best[1]:.4f}"
        text = f"step {progress.step}/{steps} · loss {loss:.4f}{held_out} · {effective:.0%} of samples count"
        PromptServer.instance.send_progress_text(text, self.reporter.node)
        return True


def first_samples_preview(data: GuidanceData) -> Callable[[Fitting], Preview]:
    """A function that makes a preview: the first samples of a collection, guided by the best network so far."""
    maker, description = data.require_maker("A preview"), data.collection.description
    prompts, seeds = zip(
        *[(description.prompt_of(number), description.seed_of(number)) for number in range(PREVIEWED)], strict=True
    )

    def make(fitting: Fitting) -> Preview:
        network = manage_network(fitting.network(), fitting.card())
        with as_nodes_run():
            latents = maker.sample(prompts, seeds, lambda *_: None, lambda sampling: guided_sampling(sampling, network))
            clips = decode(maker.vae, latents)
            scores = torch.stack(
                [score_or_nan(maker, clip, maker.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]
            )
        return Preview(
            to_image(torch.cat(list(clips[:, 0]), 1)), description.combined(scores, fitting.reward_weights).tolist()
        )

    return make


def score_or_nan(maker: SampleMaker, clip: Tensor, prompt: str) -> Tensor:
    """Raw scores (R,), or NaN if a reward cannot score the clip.

    An early network may make such clips; the training continues.
    """
    try:
        return maker.score(clip, prompt)
    except RewardError as error:
        log.warning("%s The preview has no reward.", error)
        return torch.full((len(weighted_parts(maker.reward.reward)),), math.nan)
