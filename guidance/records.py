"""Builds dataclasses from JSON content and checks all types, because files may be damaged or edited by hand."""

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import quoted

MOST = 2**64
"""Integers in files must be smaller."""


def record(kind: Any, content: Any, name: str = "it") -> Any:
    """JSON content as a dataclass, or as any type of a dataclass field. Lists become tuples; numbers must be finite.

    Fields with a default may be missing. Raises ValueError that names the entry which does not fit.
    """
    if get_origin(kind) in (Union, UnionType):
        kind = NoneType if content is None else next(part for part in get_args(kind) if part is not NoneType)
    if is_dataclass(kind) and isinstance(content, dict):
        return _dataclass(kind, content)
    if get_origin(kind) is tuple and isinstance(content, list | tuple):
        return _tuple(get_args(kind), content, name)
    small = type(content) is int and abs(content) < MOST
    if kind is float and small:
        content = float(content)
    if type(content) is not kind or (kind is int and not small) or (kind is float and not math.isfinite(content)):
        raise ValueError(f"{name} cannot be {quoted(content)}")
    return content


def _dataclass(kind: Any, content: dict[str, Any]) -> Any:
    types = get_type_hints(kind)
    if unknown := content.keys() - types.keys():
        raise ValueError(f"{quoted(min(unknown))} is not known")
    if missing := [
        field.name
        for field in fields(kind)
        if field.default is field.default_factory is MISSING and field.name not in content
    ]:
        raise ValueError(f"{missing[0]} is missing")
    return kind(**{name: record(types[name], value, name) for name, value in content.items()})


def _tuple(kinds: tuple, content: Any, name: str) -> tuple:
    if kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(content)
    if len(kinds) != len(content):
        raise ValueError(f"{name} cannot be {quoted(content)}")
    return tuple(record(kind, part, name) for kind, part in zip(kinds, content, strict=True))
