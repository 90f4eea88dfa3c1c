from bench.peers.problem import Problem
from torch import Tensor


def best_of_n(problem: Problem, n: int = 4) -> Tensor:
    """The image of n that the reward likes most."""
    candidates = problem.sample(n)
    return candidates[problem.scores(candidates).argmax()][None]
