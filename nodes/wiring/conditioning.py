"""Selects the part of a CONDITIONING that belongs to one batch row."""

import copy
from dataclasses import dataclass, field
from typing import Any

import comfy.clip_vision
import comfy.utils
from comfy.controlnet import ControlBase
from torch import Tensor


@dataclass(frozen=True)
class BatchRow:
    """Selects the part of a conditioning that ComfyUI uses for one sample of a batch."""

    index: int
    samples: int
    """Samples in the batch."""
    dimensions: int
    """Dimensions of the latents (N,C,...)."""
    controls: dict[ControlBase, ControlBase] = field(default_factory=dict)
    """ControlNet -> its copy with one hint. Positive and negative share the copy, so that ComfyUI batches them."""

    def __call__(self, conditioning: list) -> list:
        """The CONDITIONING of the sample."""
        return [
            [self.tensor(tokens), {name: self.entry(name, value) for name, value in options.items()}]
            for tokens, options in conditioning
        ]

    def tensor(self, value: Any) -> Any:
        """One row (1,...) of a tensor. ComfyUI repeats or cuts tensors to as many rows as there are samples."""
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) < 2:
            return value
        return comfy.utils.repeat_to_batch_size(value, self.samples)[self.index : self.index + 1]

    def entry(self, name: str, value: Any) -> Any:
        """The value of one option for the sample."""
        is_tensor = isinstance(value, Tensor)
        if name == "mask" and is_tensor and value.ndim < self.dimensions - 1:
            return value  # without a batch dimension
        if name.startswith("concat_") and is_tensor:  # ComfyUI resamples these instead of repeating rows
            return self.tensor(comfy.utils.resize_to_batch_size(value, self.samples))
        if isinstance(value, list):
            return [self.tensor(each) for each in value]
        if isinstance(value, comfy.clip_vision.Output):
            chosen = copy.copy(value)
            vars(chosen).update({key: self.tensor(part) for key, part in vars(value).items()})
            return chosen
        return self.control(value) if isinstance(value, ControlBase) else self.tensor(value)

    def control(self, control: ControlBase) -> ControlBase:
        if control not in self.controls:
            before = control.previous_controlnet and self.control(control.previous_controlnet)
            hint = self.tensor(control.cond_hint_original)
            self.controls[control] = control
            if before is not control.previous_controlnet or hint is not control.cond_hint_original:
                chosen = self.controls[control] = control.copy().set_previous_controlnet(before)
                chosen.cond_hint_original = hint
                chosen.extra_concat_orig = [self.tensor(each) for each in control.extra_concat_orig]
        return self.controls[control]
