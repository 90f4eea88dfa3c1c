"""What to say of a training and of a collection."""

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
"""Values of the loss that go into a card."""
NO_GUIDANCE = {"weighted": 0.0, "potential": 1.0}
"""The least loss of a network that does not guide, by objective."""


@dataclass(frozen=True)
class Fitting:
    """A training of labelled samples, and what to say of it."""

    description: Description
    reward_weights: tuple[float, ...]
    health: Health
    training: Training

    @property
    def done(self) -> bool:
        return self.training.diverged or self.training.step >= self.training.task.plan.steps

    def drop_checkpoint(self) -> None:
        """A training that is done needs it no more; one that is not goes on from it."""
        if self.done and self.training.checkpoint is not None:
            with suppress(
                OSError
            ):  # what cannot be deleted could not be written either, and costs no more than its place
                self.training.checkpoint.unlink(missing_ok=True)

    def network(self) -> GuidanceNetwork:
        """The best so far, on the CPU."""
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
        """Step and loss of the network that is kept, where samples were held out to tell."""
        curve = self.training.curve if self.training.held_out else []
        return min(curve, key=lambda point: point[1], default=None)

    def report(self) -> str:
        """What was trained on what, how it went, and what to be wary of, in lines."""
        return "\n".join([self.card().describe(), *self.outcome(), *self.warnings()])

    def outcome(self) -> list[str]:
        training, plan, best = self.training, self.training.task.plan, self.best()
        none = NO_GUIDANCE.get(plan.objective, math.inf)
        lines = []
        if best is not None and best[1] >= none:
            lines.append(
                f"That is no better than no guidance, whose loss is {none:g}: collect more samples, or raise the temperature."
            )
        stopped = f"at step {training.step} of {plan.steps}: this is the best network up to there"
        if training.diverged:
            lines.append(f"The training diverged {stopped}. Lower the learning rate, or raise the temperature.")
        elif not self.done:
            lines.append(
                f"stopped {stopped}"
                + (", and running it again goes on from there" if training.checkpoint and not training.unsaved else "")
            )
        return lines

    def warnings(self) -> list[str]:
        training = self.training
        labels = [] if training.task.plan.objective == "reward_gradient" else self.health.warnings()
        apart = (
            []
            if training.held_out
            else ["No sample was kept apart of so few, and so nothing says how good the network is: collect more."]
        )
        unsaved = (
            [f"There is no checkpoint to go on from: {training.unsaved}"] if training.unsaved and not self.done else []
        )
        return [*labels, *apart, *unsaved]


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def overview(collection: Collection, temperature: float = 1.0) -> str:
    """What a collection holds, in lines: how many samples, how every reward judges them, and what could be learned from them."""
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
