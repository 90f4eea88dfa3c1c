"""The estimators `shift` and `shift_two_pass`: D_q = D(x + (σ²/a)·g), a model call at a shifted point.

p(x0|x)·exp(g·x0) is the posterior at x + (σ²/a)·g. The formula is therefore exact for a reward linear in x0 and any
data. The model is not differentiated.
"""

from .base import Estimator


class ShiftTwoPass(Estimator):
    """Two model calls: one for a new g when it is due, one at the shifted point."""

    model_calls = 2

    def guide(self, denoise, x, sigma):
        if self.tilt.due:
            self.tilt.refresh(denoise(x), sigma)
        return denoise(x + self.process.shift_gain(sigma) * self.tilt.capped(sigma))


class Shift(Estimator):
    """One model call. It uses the previous g, and evaluates the next g at the untilted estimate D_q - s²·g.

    At D_q itself, the gradient would include the effect of the previous one and guide too little.
    """

    def guide(self, denoise, x, sigma):
        if self.tilt.gradient is None:
            return self.unguided(denoise, x, sigma)
        gradient = self.tilt.capped(sigma)
        denoised = denoise(x + self.process.shift_gain(sigma) * gradient)
        self.tilt.refresh(denoised - self.process.posterior_variance(sigma, self.settings.variance) * gradient, sigma)
        return denoised
