"""Fills in and checks the inputs of every node before it runs."""

import functools
from numbers import Integral, Real
from typing import Any, TypeVar

from comfy_api.v0_0_2 import io

from ...guidance.errors import GuidanceError, quoted

T = TypeVar("T", bound=type[io.ComfyNode])


def prepares_inputs(node: T) -> T:
    """Class decorator: before `execute`, fill in the defaults of the schema and check numbers and texts against it.

    Prompts that were saved before an optional widget existed lack its value; they get the default.
    ComfyUI lists optional inputs after the required ones, and saved workflows keep the values of widgets by their
    order. So no required widget may follow an optional one.

    ComfyUI checks the limits of widgets, but NaN passes, and it does not check values that come over a link.

    This is no base class, because ComfyUI-Manager recognizes nodes by a base class named ComfyNode.
    """
    execute = vars(node)["execute"].__func__

    @functools.wraps(execute)
    def run(cls, *args, **inputs):
        schema = cls.SCHEMA or cls.GET_SCHEMA()
        inputs = defaults(schema) | inputs
        for entry in schema.inputs:
            if entry.id in inputs:
                for value in inputs[entry.id] if schema.is_input_list else [inputs[entry.id]]:
                    require_fitting(entry, value)
        return execute(cls, *args, **inputs)

    node.execute = classmethod(run)
    return node


def defaults(schema: io.Schema) -> dict[str, Any]:
    """The defaults of the optional widgets. A combo without a default has its first option."""
    found = {}
    for entry in schema.inputs:
        if entry.optional and isinstance(entry, io.WidgetInput) and not entry.force_input:
            first = entry.default is None and isinstance(entry, io.Combo.Input)
            value = entry.options[0] if first else entry.default
            found[entry.id] = [value] if schema.is_input_list else value
    return found


def require_fitting(entry: io.Input, value: Any) -> None:
    """Raise GuidanceError that names the input if a value has the wrong type or is outside its limits.

    A number without limits, such as a score, is data: the node itself checks it.
    """
    if isinstance(entry, (io.Int.Input, io.Float.Input)) and entry.max is not None:
        kind, name = (Integral, "whole number") if isinstance(entry, io.Int.Input) else (Real, "number")
        if not (isinstance(value, kind) and entry.min <= value <= entry.max):  # false for NaN
            raise GuidanceError(f"{entry.id} must be a {name} from {entry.min} to {entry.max}, not {quoted(value)}.")
    if isinstance(entry, (io.String.Input, io.Color.Input)) and not isinstance(value, str):
        raise GuidanceError(f"{entry.id} must be a text, not {quoted(value)}.")
