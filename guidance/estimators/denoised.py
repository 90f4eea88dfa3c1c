"""The estimator `denoised`, which guides D itself."""

from .base import Estimator


class Denoised(Estimator):
    """D_q = D + s²·g, with the gradient at D and the variance s² of a Gaussian posterior (MPGD, arXiv 2311.16424)."""

    def guide(self, denoise, x, sigma):
        denoised = denoise(x)
        self.tilt.refresh(denoised, sigma)
        return denoised + self.process.posterior_variance(sigma, self.settings.variance) * self.tilt.capped(sigma)
