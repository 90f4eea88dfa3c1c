import torch
from bench.peers.problem import Problem, norm
from torch import Tensor


def noise_optimisation(problem: Problem, iterations: int = 50, rate: float = 5.0) -> Tensor:
    """ReNO (arXiv 2406.04312): gradient ascent on the noise of a one-step model, through it and the reward; the best is kept.

    SGD with Nesterov momentum .9, gradients clipped to a norm of .1, and a pull of .01 toward the typical norm of noise. The problem's
    sampler must take one step without CFG.
    """

    def optimised(denoise, x: Tensor, sigma: float) -> Tensor:
        with problem.gradient(problem.model.model):
            scale = x.std()
            noise = (x / scale).detach().requires_grad_()
            optimiser = torch.optim.SGD([noise], lr=rate, momentum=0.9, nesterov=True)
            best, best_reward = torch.zeros_like(x), torch.full((len(x),), -torch.inf, device=x.device)
            for _ in range(iterations):
                denoised, reward = problem.with_gradient(denoise, noise * scale)
                length = norm(noise)
                typical = 0.5 * length**2 - (noise[0].numel() - 1) * length.log()
                (0.01 * typical.sum() - reward.sum()).backward()
                noise.grad *= (0.1 / norm(noise.grad)).clamp(max=1)
                optimiser.step()
                optimiser.zero_grad()
                better = reward.detach() > best_reward
                best[better], best_reward[better] = denoised.detach()[better], reward.detach()[better]
        return best

    return problem.sample(change=optimised)
