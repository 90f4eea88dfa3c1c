import torch
from bench.peers.problem import Problem
from torch import Tensor


def noise_optimisation(problem: Problem, iterations: int = 50) -> Tensor:
    """ReNO (arXiv 2406.04312): gradient ascent on the noise of a one-step model, through it, the full VAE and the reward; the best is kept.

    SGD with Nesterov momentum .9, step 5, gradients clipped to a norm of .1, and a pull of .01 toward the typical norm of noise. No CFG.
    """

    def optimised(denoise, x: Tensor, sigma: float) -> Tensor:
        scale = x.flatten(1).std()
        noise = (x / scale).detach().clone().requires_grad_()
        optimiser = torch.optim.SGD([noise], lr=5.0, momentum=0.9, nesterov=True)
        best, best_score = x, torch.tensor(-torch.inf)
        for _ in range(iterations):
            with torch.enable_grad(), problem.through_model():
                denoised, reward = problem.with_gradient(denoise, noise * scale)
                norm = noise.norm()
                typical = 0.5 * norm**2 - (noise.numel() - 1) * norm.log()
                (0.01 * typical - reward.sum()).backward()
            torch.nn.utils.clip_grad_norm_([noise], 0.1)
            optimiser.step()
            optimiser.zero_grad()
            if reward.item() > best_score:
                best, best_score = denoised.detach(), reward.detach().cpu()
        return best

    return problem.sample(steps=1, change=optimised, cfg=1.0)
