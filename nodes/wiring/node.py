"""What every node of the pack does before it runs."""

import functools
from numbers import Integral, Real
from typing import Any, TypeVar

from comfy_api.v0_0_2 import io

from ...guidance.errors import GuidanceError, quoted

T = TypeVar("T", bound=type[io.ComfyNode])


def prepares_inputs(node: T) -> T:
    """A node that fills in the defaults of its own schema, and checks numbers and texts against it, before it runs.

    An optional widget that a prompt leaves out has its default, so that prompts saved before there was such an input still run.
    ComfyUI lists optional inputs after the required ones, and saved workflows keep the values of widgets by their order: no
    required widget may follow an optional one.

    ComfyUI compares numbers with their limits where they are typed in, which NaN passes, and checks nothing that comes over a link.

    It is no base class, because ComfyUI-Manager takes the classes whose base is called ComfyNode for nodes, and no others.
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
    """The values that the page gives to optional widgets: the first option where a choice names no default."""
    found = {}
    for entry in schema.inputs:
        if entry.optional and isinstance(entry, io.WidgetInput) and not entry.force_input:
            first = entry.default is None and isinstance(entry, io.Combo.Input)
            value = entry.options[0] if first else entry.default
            found[entry.id] = [value] if schema.is_input_list else value
    return found


def require_fitting(entry: io.Input, value: Any) -> None:
    """Raise GuidanceError that names the input where a number is none, or outside its limits, or a text is none.

    A number without limits, such as a score, is not checked: it is what a node works on, and the node knows what to say of it.
    """
    if isinstance(entry, (io.Int.Input, io.Float.Input)) and entry.max is not None:
        kind, name = (Integral, "whole number") if isinstance(entry, io.Int.Input) else (Real, "number")
        if not (isinstance(value, kind) and entry.min <= value <= entry.max):  # as NaN never is
            raise GuidanceError(f"{entry.id} must be a {name} from {entry.min} to {entry.max}, not {quoted(value)}.")
    if isinstance(entry, (io.String.Input, io.Color.Input)) and not isinstance(value, str):
        raise GuidanceError(f"{entry.id} must be a text, not {quoted(value)}.")
