"""Objectives that a potential is measured against."""

from reward_guidance.guidance.training.objectives import OBJECTIVES, potential

COMPARED = {
    "potential_square": potential(lambda f, w: (f.exp() - w).square()),
    "potential_log": potential(lambda f, w: (f - w.log()).square()),
}
"""f -> log E[w|x] by regression of e^f (arXiv 2405.16876), noisier than the Poisson loss; and f -> E[log w|x], which is another thing."""


def register() -> None:
    """Let plans train by them."""
    OBJECTIVES.update(COMPARED)
