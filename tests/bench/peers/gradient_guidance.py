import torch
from bench.peers.problem import Problem, scores
from torch import Tensor

STRENGTH = 0.05


def dps(problem: Problem) -> Tensor:
    """DPS (arXiv 2209.14687) and FreeDoM (2303.09833): each step moves along the gradient of r(D(x)) with respect to x, through model and full VAE."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad(), problem.through_model():
            point = x.detach().clone().requires_grad_()
            denoised, reward = problem.with_gradient(denoise, point)
            (gradient,) = torch.autograd.grad(reward.sum(), point)
        return denoised.detach() + STRENGTH * gradient / (gradient.norm() + 1e-8) * x.norm()

    return problem.sample(change=guided)


def flowchef(problem: Problem) -> Tensor:
    """FlowChef (arXiv 2412.00100): the gradient at the estimate D itself, full VAE, as if D moved with x; nothing goes back through the model."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(problem.reward(denoised).sum(), denoised)
        return denoised.detach() + STRENGTH * gradient / (gradient.norm() + 1e-8) * x.norm()

    return problem.sample(change=guided)


def fk_steering(problem: Problem, particles: int = 4, strength: float = 10.0, looks: int = 4) -> Tensor:
    """FK steering (arXiv 2501.06848): particles of a stochastic sampler, redrawn by exp(λ·Δr) at 20, 40, 60 and 80%, scored through the full VAE.

    The best of the last is kept.
    """

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        steps, process, before = len(sigmas) - 1, problem.process, torch.zeros(len(x), device=x.device)
        at = {round(steps * (look + 1) / (looks + 1)) for look in range(looks)}
        for i, (sigma, following) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)):
            denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
            noise = process.noise(x, denoised, sigma)
            if i in at:
                now = scores(problem, denoised)
                chosen = torch.multinomial((strength * (now - before)).softmax(0), len(x), replacement=True)
                denoised, noise, before = denoised[chosen], noise[chosen], now[chosen]
            fresh = 0.5**0.5 * (noise + torch.randn_like(noise))
            x = process.add_noise(denoised, fresh, following)
        return x[scores(problem, x).argmax()][None]

    return problem.sample(particles, function=sampler)
