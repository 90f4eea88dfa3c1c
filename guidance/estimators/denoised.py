from .base import Estimator


class Denoised(Estimator):
    """D_q = D + s²·g: the gradient at the denoised estimate, as if the posterior were Gaussian (MPGD, arXiv 2311.16424)."""

    def guide(self, denoise, x, sigma):
        denoised = denoise(x)
        self.tilt.refresh(denoised, sigma)
        return denoised + self.process.posterior_variance(sigma, self.settings.variance) * self.tilt.capped(sigma)
