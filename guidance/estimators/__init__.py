from .base import Denoiser, Estimator, LatentReward, NotFiniteError, Settings, reward_gradient, tilt_gradient
from .denoised import Denoised
from .jacobian import Jacobian
from .shift import Shift, ShiftTwoPass
from .smoothing import Smoothing

ESTIMATORS: dict[str, type[Estimator]] = {
    "shift": Shift,
    "shift_two_pass": ShiftTwoPass,
    "denoised": Denoised,
    "jacobian": Jacobian,
}

__all__ = [
    "ESTIMATORS",
    "Denoised",
    "Denoiser",
    "Estimator",
    "Jacobian",
    "LatentReward",
    "NotFiniteError",
    "Settings",
    "Shift",
    "ShiftTwoPass",
    "Smoothing",
    "reward_gradient",
    "tilt_gradient",
]
