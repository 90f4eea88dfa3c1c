"""The part of a CONDITIONING that belongs to one sample of a batch."""

import copy
from dataclasses import dataclass, field
from typing import Any

import comfy.clip_vision
import comfy.utils
from comfy.controlnet import ControlBase
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Takes the part of a conditioning that a stock sampler shows the model with one sample of a batch."""

    index: int
    samples: int
    """In the batch."""
    dimensions: int
    """Of the latents (N,C,...), with the first two."""
    controls: dict[ControlBase, ControlBase] = field(default_factory=dict)
    """ControlNets -> with one picture. Positive and negative share one, or they would be shown to the model apart."""

    def __call__(self, conditioning: list) -> list:
        """A CONDITIONING, of one sample."""
        return [
            [self.of(tokens), {name: self.entry(name, value) for name, value in options.items()}]
            for tokens, options in conditioning
        ]

    def of(self, value: Any) -> Any:
        """ComfyUI repeats or cuts tensors that have more or fewer rows than there are samples."""
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) < 2:
            return value
        return comfy.utils.repeat_to_batch_size(value, self.samples)[self.index : self.index + 1]

    def entry(self, name: str, value: Any) -> Any:
        if (
            name == "mask" and isinstance(value, Tensor) and value.ndim < self.dimensions - 1
        ):  # its first dimension is not the batch
            return value
        if name.startswith("concat_") and isinstance(
            value, Tensor
        ):  # ComfyUI picks rows of these instead of repeating them
            return self.of(comfy.utils.resize_to_batch_size(value, self.samples))
        if isinstance(value, list):
            return [self.of(each) for each in value]
        if isinstance(value, comfy.clip_vision.Output):
            chosen = copy.copy(value)
            vars(chosen).update({key: self.of(part) for key, part in vars(value).items()})
            return chosen
        return self.control(value) if isinstance(value, ControlBase) else self.of(value)

    def control(self, control: ControlBase) -> ControlBase:
        if control not in self.controls:
            before = control.previous_controlnet and self.control(control.previous_controlnet)
            hint = self.of(control.cond_hint_original)
            self.controls[control] = control
            if before is not control.previous_controlnet or hint is not control.cond_hint_original:
                chosen = self.controls[control] = control.copy().set_previous_controlnet(before)
                chosen.cond_hint_original = hint
                chosen.extra_concat_orig = [self.of(each) for each in control.extra_concat_orig]
        return self.controls[control]
