"""Reports of trainings and collections, for people and for the card."""

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass

from ..data.collection import Collection
from ..data.description import Description
from ..errors import GuidanceError
from ..network.card import Card
from ..network.unet import GuidanceNetwork
from .labels import Health, label
from .loop import Training

CURVE_END = 20
"""Evaluations that a card lists."""
NO_GUIDANCE = {"weighted": 0.0, "potential": 1.0}
"""The loss of a network without guidance, by objective."""


@dataclass(frozen=True)
class Fitting:
    """A training on labelled samples, and its reports."""

    description: Description
    reward_weights: tuple[float, ...]
    health: Health
    training: Training

    @property
    def done(self) -> bool:
        """Whether no steps are left."""
        return self.training.diverged or self.training.step >= self.training.task.plan.steps

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint if the training is done."""
        if self.done and self.training.checkpoint is not None:
            with suppress(OSError):  # a checkpoint that cannot be deleted does no harm
                self.training.checkpoint.unlink(missing_ok=True)

    def network(self) -> GuidanceNetwork:
        """The best network so far, on the CPU."""
        return self.training.result().cpu()

    def card(self) -> Card:
        plan = self.training.task.plan
        return Card(
            base=self.description.base,
            form=plan.form,
            objective=plan.objective,
            temperature=plan.temperature,
            rewards=self.description.rewards,
            reward_weights=self.reward_weights,
            reward_mean=self.health.mean,
            reward_std=self.health.std,
            prompts=digest(self.description.prompts),
            samples=self.health.count,
            steps=self.training.step,
            effective=self.health.effective,
            curve=tuple(self.training.curve[-CURVE_END:]) if self.training.held_out else (),
            best=self.best(),
            shape=self.description.shape,
        )

    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the best network. None if no samples were held out."""
        curve = self.training.curve if self.training.held_out else []
        return min(curve, key=lambda point: point[1], default=None)

    def report(self) -> str:
        """The card, the outcome and warnings, several lines."""
        return "\n".join([self.card().describe(), *self.outcome(), *self.warnings()])

    def outcome(self) -> list[str]:
        """Sentences about trainings that were stopped, diverged, or have not improved on no guidance."""
        training, plan, best = self.training, self.training.task.plan, self.best()
        none = NO_GUIDANCE.get(plan.objective, math.inf)
        lines = []
        if best is not None and best[1] >= none:
            lines.append(
                f"That is no better than no guidance, whose loss is {none:g}: "
                "collect more samples, or raise the temperature."
            )
        stopped = f"at step {training.step} of {plan.steps}: this is the best network until then"
        if training.diverged:
            lines.append(f"The training diverged {stopped}. Lower the learning rate, or raise the temperature.")
        elif not self.done:
            saved = training.checkpoint and not training.unsaved
            lines.append(f"stopped {stopped}" + (", and running it again continues from there" if saved else ""))
        return lines

    def warnings(self) -> list[str]:
        """Sentences about labels, held-out samples and checkpoints that are missing or insufficient."""
        training = self.training
        labels = [] if training.task.plan.objective == "reward_gradient" else self.health.warnings()
        few = "There are too few samples to hold any out, so the quality of the network is unknown: collect more."
        held_out = [] if training.held_out else [few]
        unsaved = training.unsaved and not self.done
        checkpoint = [f"There is no checkpoint to continue from: {training.unsaved}"] if unsaved else []
        return [*labels, *held_out, *checkpoint]


def digest(content: object) -> str:
    """12 hexadecimal digits of a hash of the content's repr."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def overview(collection: Collection, temperature: float = 1.0) -> str:
    """A summary of a collection, several lines: samples, scores of each reward, effective sample size and warnings."""
    samples = collection.load()
    scores, description = samples.scores, samples.description
    left_out = f"; {samples.unscored} more could not be scored and are left out" if samples.unscored else ""
    lines = [f"{len(scores)} samples of {len(description.prompts)} prompts in {collection.folder.name}{left_out}"]
    spreads = zip(description.rewards, scores.mean(0).tolist(), scores.std(0, correction=0).tolist(), strict=True)
    lines += [f"{name}: {mean:.4f} ± {std:.4f}" for name, mean, std in spreads]
    try:
        _, health = label(samples.rewards(), samples.prompts, temperature)
        lines += [f"at temperature {temperature:g}, {health.effective:.1%} of the samples count", *health.warnings()]
    except GuidanceError as error:
        lines.append(str(error))
    return "\n".join(lines)
