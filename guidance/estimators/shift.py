"""D_q = D(x + (σ²/a)·g): the model is called at a shifted point.

p(x0|x)·exp(g·x0) is the posterior at x + (σ²/a)·g, so this is exact for a reward linear in x0, whatever the data.
No gradient of the model is taken.
"""

from .base import Estimator


class ShiftTwoPass(Estimator):
    """Two model calls: one to find g where it is due, one at the shifted point."""

    model_calls = 2

    def guide(self, denoise, x, sigma):
        if self.tilt.due:
            self.tilt.refresh(denoise(x), sigma)
        return denoise(x + self.process.shift_gain(sigma) * self.tilt.capped(sigma))


class Shift(Estimator):
    """One model call: g comes from the previous call, and the next g is taken at the untilted estimate D_q - s²·g.

    Taken at D_q itself the gradient would see its own effect and tilt too little.
    """

    def guide(self, denoise, x, sigma):
        if self.tilt.gradient is None:
            return self.unguided(denoise, x, sigma)
        gradient = self.tilt.capped(sigma)
        denoised = denoise(x + self.process.shift_gain(sigma) * gradient)
        self.tilt.refresh(denoised - self.process.posterior_variance(sigma, self.settings.variance) * gradient, sigma)
        return denoised
