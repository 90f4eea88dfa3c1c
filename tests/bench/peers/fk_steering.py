import torch
from bench.peers.problem import Problem
from torch import Tensor


def fk_steering(problem: Problem, particles: int = 4, strength: float = 10.0, looks: int = 4) -> Tensor:
    """FK steering (arXiv 2501.06848): particles of a stochastic sampler, redrawn by exp(λ·Δr(D)) at 20, 40, 60 and 80%.

    The best of the last is kept.
    """

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        steps, process, before = len(sigmas) - 1, problem.process, torch.zeros(len(x), device=x.device)
        at = {round(steps * (look + 1) / (looks + 1)) for look in range(looks)}
        for i, (sigma, following) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)):
            denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
            noise = (x - process.scale(sigma) * denoised) / process.noise_std(sigma)
            if i in at:
                now = problem.scores(denoised)
                chosen = torch.multinomial((strength * (now - before)).softmax(0), len(x), replacement=True)
                denoised, noise, before = denoised[chosen], noise[chosen], now[chosen]
            fresh = 0.5**0.5 * (noise + torch.randn_like(noise))
            x = process.add_noise(denoised, fresh, following)
        return x[problem.scores(x).argmax()][None]

    return problem.sample(particles, function=sampler)
