"""Strict conversion of a mapping (from YAML, JSON) to a dataclass: a mistyped key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["from_dict"]

T = TypeVar("T")


def from_dict(cls: type[T], mapping: Mapping[str, Any], *, where: str | None = None) -> T:
    """Builds the dataclass `cls` from `mapping`, checking every key and the type of every value.

    An integer is taken where a number is wanted, a list where a tuple is, and a mapping where
    the field is itself a dataclass; nothing else is converted. One exception serves YAML 1.1,
    which reads `1e-4` as a string: text that is a number is taken as one.

    Args:
        cls: a dataclass.
        mapping: its fields by name; fields left out keep their defaults.
        where: what to call the mapping in messages; the name of the class unless given.

    Raises:
        ValueError: an unknown or missing key (the known ones are listed) or a value of a wrong
            type; and whatever `cls` itself raises about its values.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Sizes:
        ...     dim: int
        ...     dropout: float = 0.1
        >>> from_dict(Sizes, {"dim": 8, "dropout": 0})
        Sizes(dim=8, dropout=0.0)
    """
    where = where or cls.__name__
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {mapping!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    known = ", ".join(fields)
    for key in mapping:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean `{close[0]}`?)" if close else ""
            raise ValueError(f"{where}: unknown key `{key}`{hint}; the known ones are {known}")
    missing = [name for name, field in fields.items() if _required(field) and name not in mapping]
    if missing:
        raise ValueError(f"{where}: missing key `{missing[0]}`; the known ones are {known}")
    hints = typing.get_type_hints(cls)
    return cls(**{k: _convert(hints[k], v, f"{where}: `{k}`") for k, v in mapping.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            known = ", ".join(map(str, arguments))
            raise ValueError(f"{where} must be one of {known}, got {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {k: _convert(arguments[1], item, f"{where}[{k!r}]") for k, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where)
    if hint is float:
        return _convert_float(value, where)
    plain = origin or hint
    # `True` is an `int` to Python, but not to a person who writes a configuration.
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {_name(hint)}, got {value!r}")
    return value


def _convert_float(value: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{where} must be a number, got {value!r}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{where} must have {len(arguments)} entries, got {value!r}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(pairs))


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [hint for hint in arguments if hint is not type(None)]
    if len(choices) == 1:
        return _convert(choices[0], value, where)
    for hint in choices:
        try:
            return _convert(hint, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where} must be {' or '.join(map(_name, choices))}, got {value!r}")


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
