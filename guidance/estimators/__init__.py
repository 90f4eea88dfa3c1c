from .base import Estimator
from .denoised import Denoised
from .jacobian import Jacobian
from .shift import Shift, ShiftTwoPass
from .smoothing import Smoothing
from .tilt import NotFiniteError, RewardFunction, Settings, reward_gradient, tilt_gradient

ESTIMATORS: dict[str, type[Estimator]] = {
    "shift": Shift,
    "shift_two_pass": ShiftTwoPass,
    "denoised": Denoised,
    "jacobian": Jacobian,
}

__all__ = [
    "ESTIMATORS",
    "Denoised",
    "Estimator",
    "Jacobian",
    "RewardFunction",
    "NotFiniteError",
    "Settings",
    "Shift",
    "ShiftTwoPass",
    "Smoothing",
    "reward_gradient",
    "tilt_gradient",
]
