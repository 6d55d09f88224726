"""From a mapping read out of YAML to typed recipe sections, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from vlm2vec.files.documents import shown

from ..losses import Loss, loss_class


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a nested key (`loss.temperature`) of a recipe read from YAML; sections on the way are made."""
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent} is not a section of the recipe")
    if last == "lora" and isinstance(values.get("lora"), dict) and value == {}:
        return  # --lora on a recipe that has the section already
    values[last] = value


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping; ValueError names an unknown key, with the nearest known one, or a missing key."""
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the recipe'} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:80], fields, n=1, cutoff=0.5)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known keys: {', '.join(fields)[:300]}"
            raise ValueError(f"unknown recipe key {where}{key if len(str(key)) <= 80 else shown(key)}{hint}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"the recipe lacks {', '.join(where + name for name in missing)}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _shape(hint: Any) -> type | None:
    """What YAML writes a value of this type as: list, dict, or None for others."""
    if typing.get_origin(hint) in (list, dict):
        return typing.get_origin(hint)
    return dict if hint is Loss or dataclasses.is_dataclass(hint) else None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        errors = []
        options = [a for a in arguments if a is not type(None)]
        # a list is meant for the type that is one, a mapping for the one that has keys: their errors say what is wrong
        alike = [a for a in options if _shape(a) is type(value)] if isinstance(value, (list, dict)) else options
        for option in alike or options:
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if hint is Loss:
        hint = loss_class(value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{where}.")
    if origin is list:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
            value = [int(part) if arguments[0] is int and part.isdecimal() else part for part in value]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {shown(value)}")
        return [_convert(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {shown(value)}")
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 2e-5 as a string
        except (ValueError, OverflowError):
            raise ValueError(f"{where} must be a number, got {shown(value)}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {shown(value)}")
    return value
